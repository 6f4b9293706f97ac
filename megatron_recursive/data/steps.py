"""The steps of datatrove's pipelines: read a part, write it as an indexed dataset, join the parts."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.base import BaseReader

from megatron_recursive.data.files import cannot_write, sync
from megatron_recursive.data.indexed import token_type, write_index
from megatron_recursive.data.joining import finish
from megatron_recursive.data.progress import note_count
from megatron_recursive.data.readers import read_span
from megatron_recursive.data.tokenizer import StoredTokenizer, load_document_encoder
from megatron_recursive.data.work_folder import PartReport, WorkFolder
from megatron_recursive.errors import UserError

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**20
_COUNT_S = 0.5
_PIECE = 2**16  # lengths at a time


class PartReader(BaseReader):
    """Reads the documents of one part of the plan, whose number is the task's rank.

    Malformed ones raise, or with ``on_error`` ``skip`` are counted in ``report``, as the bytes are.
    """

    name = "📖 Spans of files"

    def __init__(self, work: WorkFolder, json_key: str, on_error: str) -> None:
        super().__init__(text_key=json_key)
        self.work, self.on_error, self.report = work, on_error, PartReport()

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for span in self.work.read_part(rank):
            for number, document in enumerate(read_span(span, self.text_key, self._reject)):
                self.report.bytes += document.size
                yield Document(document.text, f"{span.path}:{span.start}/{number}", metadata={"file_path": span.path})

    def _reject(self, error: UserError) -> None:
        self.report.reject(error, self.on_error)


class IndexedDatasetWriter(PipelineStep):
    """Tokenizes documents and writes those of a task as one dataset; takes four bytes of memory a document.

    ``reader`` begins the pipeline: its report counts what was read, this step what is written.
    """

    type = "💽 - WRITER"
    name = "Megatron indexed dataset"
    ends: tuple[str, ...] = ("bin", "idx")  # the files of a part, .idx last

    def __init__(self, reader: PartReader, tokenizer: StoredTokenizer, append_eod: bool) -> None:
        super().__init__()
        self.reader, self.work, self.tokenizer, self.append_eod = reader, reader.work, tokenizer, append_eod

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        # One process is one core: how many there are is for --workers to say.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        prefix = self.work.part(rank)
        self.reader.report = PartReport(started=time.time())
        try:
            report = self._write(data, prefix, rank, self.reader.report)
        except OSError as error:
            raise cannot_write(prefix, error) from error
        report.bytes = self.work.part_sizes()[rank]
        report.finished = time.time()
        self.work.write_report(rank, report)
        self.stat_update("documents", value=report.documents)
        self.stat_update("tokens", value=report.tokens)

    def _samples(self, documents: Any) -> Iterator[list[tuple[list[int], bytes | None]]]:
        """Token ids of consecutive documents, and for ``.supervised`` the bytes that say which a loss counts."""
        encode = load_document_encoder(self.tokenizer, self.append_eod)
        for texts in _batches(documents):
            found = encode(texts)
            for _ in (ids for ids in found if self.tokenizer.eod in ids[int(self.tokenizer.special) : -1]):
                self.reader.report.drop("documents kept in whose text the end-of-document token is written out, which "
                                        "it then is")  # fmt: skip
            yield [(ids, None) for ids in found]

    def _write(self, documents: Any, prefix: Path, rank: int, report: PartReport) -> PartReport:
        token = token_type(self.tokenizer.id_range)
        # The process id: a process of a killed run may still be at it.
        files = [prefix.with_name(f"{prefix.name}.{end}.{os.getpid()}") for end in self.ends]
        lengths = array("i")
        counted = time.monotonic()
        try:
            with ExitStack() as opened:
                stream, *others = [opened.enter_context(open(file, "wb")) for file in files[:-1]]
                for samples in self._samples(documents):
                    for ids, supervised in samples:
                        stream.write(numpy.array(ids, token).tobytes())
                        lengths.append(len(ids))
                        report.tokens += len(ids)
                        if supervised is not None:
                            others[0].write(supervised)
                            report.supervised += supervised.count(1)
                    report.documents = len(lengths)
                    if time.monotonic() - counted >= _COUNT_S:
                        note_count(self.work.counts, rank, report.documents, report.bytes)
                        counted = time.monotonic()
            note_count(self.work.counts, rank, report.documents, report.bytes)
            pieces = range(0, len(lengths), _PIECE)
            write_index(files[-1], token, lambda: (lengths[start : start + _PIECE] for start in pieces))
            for file, end in zip(files, self.ends, strict=True):
                sync(file)
                os.replace(file, prefix.with_suffix(f".{end}"))
        finally:
            for file in files:
                file.unlink(missing_ok=True)
        return report


def _batches(documents: Any) -> Iterator[list[str]]:
    """Texts of consecutive documents."""
    texts: list[str] = []
    characters = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if len(texts) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


class PartsMerger(PipelineStep):
    """Joins or publishes the parts once all are there: the last task of a run on a cluster."""

    type = "💽 - WRITER"
    name = "Megatron indexed dataset, joined"

    def __init__(self, work: WorkFolder, prefix: str, tokenizer: StoredTokenizer, join: bool) -> None:
        super().__init__()
        self.work, self.prefix, self.tokenizer, self.join = work, prefix, tokenizer, join

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        total = finish(self.work, self.prefix, self.tokenizer, self.join)
        self.stat_update("documents", value=total.documents)
        self.stat_update("tokens", value=total.tokens)
        # A later run of the same command begins anew; the logs stay.
        self.work.plan.unlink(missing_ok=True)
