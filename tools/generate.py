"""The command ``megatron-recursive generate``: text from a model or a checkpoint."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("generate")
