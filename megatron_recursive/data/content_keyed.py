"""Megatron's GPT dataset with cached indices that answer to the documents and not to their path alone.

Megatron 0.19 caches, under a hash of path, seed, lengths and split, in which order documents are cut into samples. Data
written again under its path would be read by the old order: new documents never, or documents that are gone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_recursive.data.preparation import digest, read_preparation
from megatron_recursive.data.sources import find_files

HEADER = 34  # bytes of an .idx before the lengths, the last 16 of them two counts: sequences and documents
DATA_FLAGS = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path",
              "per_split_data_args_path", "chat_data", "valid_chat_data", "data_stream")  # fmt: skip


class ContentKeyedGPTDataset(GPTDataset):
    """A GPTDataset whose cache is named by the lengths of its documents too, which is all that the order depends on.

    Tokens are read from the ``.bin`` itself. Dates are left out: copies of one dataset on the disks of several nodes
    share a cache.
    """

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str | None, *args: Any, **kwargs: Any) -> None:
        lengths = _lengths_digest(indexed_dataset.index.bin_buffer)
        super().__init__(indexed_dataset, f"{dataset_path} {lengths}", *args, **kwargs)


def _lengths_digest(index: Any) -> str:
    """SHA-256 of the header and the lengths, from the ``.idx`` itself: counts may be given by the user (fast load)."""
    sequences = int.from_bytes(index[HEADER - 16 : HEADER - 8], "little")
    return hashlib.sha256(index[: HEADER + 4 * sequences]).hexdigest()


def data_of_run(args: argparse.Namespace) -> str:
    """The digest of what a run's data flags name; "" where they name nothing."""
    found = {name: [*_pieces(name, value)] for name in DATA_FLAGS if (value := getattr(args, name, None))}
    return digest(found) if found else ""


def _pieces(flag: str, given: str | list[str]) -> Iterator[Any]:
    """Each word's identity: a dataset's, those of a stream's files, or the word itself, such as a weight."""
    for word in [given] if isinstance(given, str) else given:
        index = Path(f"{word}.idx")
        if index.is_file():
            made = read_preparation(word)
            held = [os.path.getsize(index), _lengths_digest(numpy.memmap(index, numpy.uint8, "r"))]
            yield [made.source, made.tokens] if made is not None else held
        elif flag == "data_stream":
            yield [[Path(file.path).name, file.size] for file in find_files([word], flag="--data-stream")]
        elif flag.endswith("data_args_path") and Path(word).is_file():  # a list of datasets
            yield from _pieces("", re.findall(r'[^\s"\[\]{},]+', Path(word).read_text(encoding="utf-8")))
        else:
            yield word
