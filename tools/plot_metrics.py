"""The command ``megatron-recursive plot``: draw the losses of a run."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("plot")
