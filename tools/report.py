"""The command ``megatron-recursive report``: one page about runs or models, from what other commands have found."""

from megatron_recursive.commands import door

if __name__ == "__main__":
    door("report")
