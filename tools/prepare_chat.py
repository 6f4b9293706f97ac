"""The command ``megatron-recursive prepare-chat``: conversations to a Megatron dataset."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("prepare-chat")
