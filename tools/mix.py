"""The command ``megatron-recursive mix``: corpora to shuffled Parquet shards."""

from megatron_recursive.commands import door

if __name__ == "__main__":  # worker processes import this file
    door("mix")
