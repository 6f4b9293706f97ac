"""Imported once by the server process from which the workers are forked, so that none of them waits for Megatron."""

from megatron_recursive.data import steps
from megatron_recursive.data.indexed import megatron_indexed_dataset

megatron_indexed_dataset()

__all__ = ["steps"]
