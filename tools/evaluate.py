"""The command ``megatron-recursive evaluate``: lm-eval's tasks on a model or a checkpoint."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("evaluate")
