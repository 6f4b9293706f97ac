"""The command ``megatron-recursive tokenizer``: train a tokenizer."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("tokenizer")
