"""The command ``megatron-recursive count``: parameters, FLOPs, cache and memory of a model, by part."""

from megatron_recursive.commands import door

if __name__ == "__main__":
    door("count")
