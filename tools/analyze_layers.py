"""The command ``megatron-recursive layers``: what each layer changes, and which of them to loop."""

from megatron_recursive.commands import door

if __name__ == "__main__":
    door("layers")
