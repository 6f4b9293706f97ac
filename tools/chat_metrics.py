"""The command ``megatron-recursive chat-metrics``: a chat model on held-out turns."""

from megatron_recursive.commands import door

if __name__ == "__main__":
    door("chat-metrics")
