"""Parquet as one endless sequence of tokens, without an index of them: row groups are tokenized as they are read."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy

from megatron_recursive.data.parquet import row_group_sizes
from megatron_recursive.data.preparation import digest
from megatron_recursive.data.readers import read_span
from megatron_recursive.data.sources import find_files
from megatron_recursive.data.spans import Span
from megatron_recursive.data.tokenizer import StoredTokenizer, load_document_encoder
from megatron_recursive.errors import UserError

_BATCH = 256  # documents that are tokenized at a time
_FOOTERS = 16  # that are read at a time


class TokenStream:
    """The documents of a folder's files in order, each with its end-of-document token, one behind the other.

    In each further epoch the row groups come in another order. What token n is depends on files, tokenizer and seed
    alone, which ``identity`` stands for. A ``mark`` (row group, counted through the epochs; tokens before it) lets
    another stream begin there; with an earlier one it takes longer, and finds the same.

    Raises:
        UserError: there is no .parquet, another file, or one that cannot be read.
    """

    def __init__(self, folder: str, tokenizer: StoredTokenizer, json_key: str = "text", seed: int = 0) -> None:
        files = find_files([folder], flag="--data-stream")
        for file in files:
            if not file.path.lower().endswith(".parquet"):
                raise UserError(f"--data-stream {folder} holds {file.path}, which is no .parquet; leave it out")
        with ThreadPoolExecutor(_FOOTERS) as threads:
            sizes = list(threads.map(row_group_sizes, [file.path for file in files]))
        self.groups = [
            Span(file.path, number, number + 1, size)
            for file, groups in zip(files, sizes, strict=True) for number, size in enumerate(groups)
        ]  # fmt: skip
        if not self.groups:
            raise UserError(f"--data-stream {folder} holds no row; name other files")
        self.folder, self.json_key, self.seed = folder, json_key, seed
        names = [[Path(file.path).name, file.size] for file in files]
        self.identity = digest([names, tokenizer.digest, json_key, seed])
        self.encode = load_document_encoder(tokenizer)
        self.go_on_from((0, 0))

    def go_on_from(self, mark: tuple[int, int]) -> None:
        self._marks, self._source = deque([mark]), self._pieces(*mark)
        self._start, self._tokens = mark[1], numpy.empty(0, numpy.int32)

    def read(self, start: int, count: int) -> numpy.ndarray:
        """``count`` tokens from number ``start`` on; fast where that grows from call to call."""
        if start < self._start:
            self.go_on_from((0, 0))
        while self._start + len(self._tokens) < start + count:
            drop = min(start - self._start, len(self._tokens))
            self._tokens = numpy.concatenate((self._tokens[drop:], next(self._source)))
            self._start += drop
        return self._tokens[start - self._start :][:count].astype(numpy.int64)

    def mark(self, token: int) -> tuple[int, int]:
        """The last mark before a token, which is not before those of earlier calls."""
        while len(self._marks) > 1 and self._marks[1][1] <= token:
            self._marks.popleft()
        return self._marks[0]

    def _pieces(self, first: int, tokens: int) -> Iterator[numpy.ndarray]:
        """Token ids of consecutive documents."""
        read, order = 0, self.groups
        for number in itertools.count(first):
            epoch, place = divmod(number, len(self.groups))
            if epoch and (place == 0 or number == first):
                order = random.Random(f"{self.seed} {epoch}").sample(self.groups, len(self.groups))
            if number != first:
                self._marks.append((number, tokens))
            for documents in itertools.batched(read_span(order[place], self.json_key), _BATCH):
                ids = self.encode([document.text for document in documents])
                piece = numpy.fromiter(itertools.chain.from_iterable(ids), numpy.int32)
                tokens, read = tokens + len(piece), read + len(piece)
                yield piece
            if not read and number - first >= len(self.groups):
                raise UserError(f"--data-stream {self.folder} holds no text under {self.json_key!r}; name other files")
