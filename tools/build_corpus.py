"""The command ``megatron-recursive corpus``: write a small English corpus."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("corpus")
