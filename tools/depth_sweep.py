"""The command ``megatron-recursive sweep``: losses by depth, settled answers, and what leaving early would cost."""

from megatron_recursive.commands import door

if __name__ == "__main__":
    door("sweep")
