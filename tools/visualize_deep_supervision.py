"""The command ``megatron-recursive plot schedule``: what deep supervision's three schedules weigh and cost."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("plot", "schedule")
