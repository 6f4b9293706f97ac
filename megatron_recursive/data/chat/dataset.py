"""Conversations as training reads them: packed into rows of one length, whatever the number of epochs.

``PREFIX`` holds a sample (a conversation, or a window of one) as a document; ``PREFIX_supervised`` holds, for each of
its tokens, 1 where the model is to predict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_recursive.data.chat.packing import pack
from megatron_recursive.data.indexed import all_lengths, check_indexed_dataset
from megatron_recursive.data.joining import SUPERVISED
from megatron_recursive.errors import UserError


def chat_lengths(prefix: str) -> Any:
    """The tokens of each sample [N].

    Raises:
        UserError: a file is missing or half written, or the two do not belong together.
    """
    for each in (prefix, f"{prefix}{SUPERVISED}"):
        check_indexed_dataset(each, "prepare-chat")
    lengths = all_lengths(prefix)
    if not np.array_equal(lengths, all_lengths(f"{prefix}{SUPERVISED}")):
        raise UserError(f"{prefix}{SUPERVISED}.idx has other lengths than {prefix}.idx; prepare the data again")
    return lengths


class ChatRows:
    """Samples packed into rows of ``seq_length`` tokens, numbered through all epochs; a sample has one token more.

    What stands at an index is a function of the data and the seed alone, so that samplers that count samples resume
    where they were. An epoch of training has the same rows in an order of its own; every evaluation reads the same.

    Args:
        lengths: [N] of all samples; ``documents`` are the first and the behind-the-last of those that are read.
        epochs: behind so many all rows are empty (None: they go on for ever).
        evaluation: the rows that an evaluation reads, filled up with empty ones; None for those to train on.
    """

    def __init__(
        self, prefix: str, lengths: Any, documents: Sequence[int], seq_length: int, seed: int, split: Split,
        samples: int, *, epochs: int | None = None, evaluation: int | None = None,
    ) -> None:  # fmt: skip
        first, last = documents
        rows = pack(np.maximum(lengths[first:last] - 1, 0), seq_length, seed)
        self._samples = np.asarray([first + sample for row in rows for sample in row], np.int64)
        self._ends = np.cumsum([len(row) for row in rows])
        self.rows, self.period = len(rows), evaluation or len(rows)
        self.fill = float((lengths[first:last] - 1).sum() / (len(rows) * seq_length))
        self.split, self.seq_length, self.seed, self.samples, self.epochs = split, seq_length, seed, samples, epochs
        self._tokens, self._supervised = IndexedDataset(prefix), IndexedDataset(f"{prefix}{SUPERVISED}")
        self._order: tuple[int, Any] = -1, None

    def __len__(self) -> int:
        return self.samples

    def samples_at(self, index: int) -> list[int]:
        """The numbers of the samples in a row; none in an empty one."""
        epoch, place = divmod(index, self.period)
        if place >= self.rows or (self.epochs is not None and epoch >= self.epochs):
            return []
        if self.split is Split.train:
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            place = self._order[1][place]
        return [int(sample) for sample in self._samples[self._ends[place - 1] if place else 0 : self._ends[place]]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Arrays [S]; ``document_ids`` number the conversations, and what is behind them is one of its own."""
        row = {name: np.zeros(self.seq_length, np.int64) for name in ("tokens", "labels", "document_ids")}
        position_ids, loss_mask = np.zeros(self.seq_length, np.int64), np.zeros(self.seq_length, np.float32)
        start, samples = 0, self.samples_at(index)
        for number, sample in enumerate(samples):
            ids, counted = self._tokens.get(sample), self._supervised.get(sample)
            here = slice(start, start + len(ids) - 1)
            row["tokens"][here], row["labels"][here], loss_mask[here] = ids[:-1], ids[1:], counted[1:]
            row["document_ids"][here], position_ids[here] = number, np.arange(len(ids) - 1)
            start = here.stop
        row["document_ids"][start:] = len(samples)
        position_ids[start:] = np.arange(self.seq_length - start)
        return {**row, "position_ids": position_ids, "loss_mask": loss_mask}
