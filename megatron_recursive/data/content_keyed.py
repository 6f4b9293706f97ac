"""Megatron's GPT dataset with cached indices that answer to the documents and not to their path alone.

Megatron 0.19 caches, under a hash of path, seed, lengths and split, in which order documents are cut into samples. Data
written again under its path would be read by the old order: new documents never, or documents that are gone.
"""

from __future__ import annotations

import hashlib
from typing import Any

from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

HEADER = 34  # bytes of an .idx before the lengths, the last 16 of them two counts: sequences and documents


class ContentKeyedGPTDataset(GPTDataset):
    """A GPTDataset whose cache is named by the lengths of its documents too, which is all that the order depends on.

    Tokens are read from the ``.bin`` itself. Dates are left out: copies of one dataset on the disks of several nodes
    share a cache.
    """

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(indexed_dataset, f"{dataset_path} {_lengths_digest(indexed_dataset)}", *args, **kwargs)


def _lengths_digest(dataset: IndexedDataset) -> str:
    """SHA-256 of the header and the lengths, from the ``.idx`` itself: counts may be given by the user (fast load)."""
    index = dataset.index.bin_buffer
    sequences = int.from_bytes(index[HEADER - 16 : HEADER - 8], "little")
    return hashlib.sha256(index[: HEADER + 4 * sequences]).hexdigest()
