"""The command ``megatron-recursive plot``: pictures of runs, plans, schedules and measurements."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("plot")
