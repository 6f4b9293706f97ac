"""The command ``megatron-recursive convert``: from and to Hugging Face models."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("convert")
