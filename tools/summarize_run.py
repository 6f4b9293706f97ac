"""The command ``megatron-recursive summarize``: what a run trained, in a few lines."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("summarize")
