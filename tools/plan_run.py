"""The command ``megatron-recursive plan``: which layouts fit, and how fast they would be."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("plan")
