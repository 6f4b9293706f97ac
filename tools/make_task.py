"""The command ``megatron-recursive task``: tasks that need depth, and how a model does on them."""

from megatron_recursive.commands import door

if __name__ == "__main__":
    door("task")
