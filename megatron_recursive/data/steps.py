"""The steps of datatrove's pipelines: read a part, write it as an indexed dataset, join the parts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.base import BaseReader

from megatron_recursive.data.files import cannot_write, sync
from megatron_recursive.data.indexed import check_indexed_dataset, megatron_indexed_dataset, quiet_megatron
from megatron_recursive.data.preparation import SUFFIX, Preparation, digest
from megatron_recursive.data.progress import Progress
from megatron_recursive.data.readers import read_span
from megatron_recursive.data.tokenizer import StoredTokenizer, load_encoder
from megatron_recursive.data.work_folder import KEPT_REASONS, PartReport, WorkFolder
from megatron_recursive.errors import UserError

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**20
_REPORT_S = 0.5

MALFORMED = "malformed"
"""Key in the metadata of the empty document that stands for one that could not be read; its value tells why."""


class PartReader(BaseReader):
    """Reads the documents of one part of the plan, whose number is the task's rank.

    With ``on_error`` ``skip`` a malformed document becomes an empty one with the reason in its metadata.
    """

    name = "📖 Spans of files"

    def __init__(self, work: WorkFolder, json_key: str, on_error: str) -> None:
        super().__init__(text_key=json_key)
        self.work, self.on_error = work, on_error

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        rejected: list[UserError] = []

        def reject(error: UserError) -> None:
            if self.on_error == "stop":
                raise error
            rejected.append(error)

        for span in self.work.read_part(rank):
            for document in read_span(span, self.text_key, reject):
                yield from _take(rejected, span.path)
                yield Document(document.text, span.path, metadata={"size": document.size})
            yield from _take(rejected, span.path)


def _take(rejected: list[UserError], path: str) -> Iterator[Document]:
    while rejected:
        yield Document("", path, metadata={MALFORMED: str(rejected.pop(0))})


class IndexedDatasetWriter(PipelineStep):
    """Tokenizes documents and writes those of a task as one dataset, through Megatron's ``IndexedDatasetBuilder``."""

    type = "💽 - WRITER"
    name = "Megatron indexed dataset"

    def __init__(self, work: WorkFolder, tokenizer: StoredTokenizer, append_eod: bool) -> None:
        super().__init__()
        self.work, self.tokenizer, self.append_eod = work, tokenizer, append_eod

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        # One process is one core: how many there are is for --workers to say.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        prefix = self.work.part(rank)
        try:
            report = self._write(data, prefix, rank)
        except OSError as error:
            raise cannot_write(prefix, error) from error
        self.stat_update("documents", value=report.documents)
        self.stat_update("tokens", value=report.tokens)

    def _write(self, data: Any, prefix: Path, rank: int) -> PartReport:
        encode, megatron = load_encoder(self.tokenizer), megatron_indexed_dataset()
        dtype = megatron.DType.optimal_dtype(self.tokenizer.id_range)
        eod = [self.tokenizer.eod] if self.append_eod and self.tokenizer.eod is not None else []
        # The process id: a process of a killed run may still be at it.
        bin_file, idx_file = (prefix.with_name(f"{prefix.name}.{end}.{os.getpid()}") for end in ("bin", "idx"))
        builder = megatron.IndexedDatasetBuilder(str(bin_file), dtype=dtype)
        report = PartReport(started=time.time())
        self.work.write_report(rank, report)
        reported = time.monotonic()
        try:
            for texts, size in _batches(data, report):
                for ids in encode(texts):
                    if ids:
                        if not self.tokenizer.special or ids[-1:] != eod:  # some tokenizers end a text with it
                            ids += eod
                        builder.add_document(numpy.array(ids, dtype), [len(ids)])
                        report.documents += 1
                        report.tokens += len(ids)
                report.bytes += size
                if time.monotonic() - reported >= _REPORT_S:
                    self.work.write_report(rank, report)
                    reported = time.monotonic()
            builder.finalize(str(idx_file))
            for file, end in ((bin_file, "bin"), (idx_file, "idx")):
                sync(file)
                os.replace(file, prefix.with_suffix(f".{end}"))
        finally:
            builder.data_file.close()
            bin_file.unlink(missing_ok=True)
            idx_file.unlink(missing_ok=True)
        report.bytes = sum(span.size for span in self.work.read_part(rank))
        report.finished = time.time()
        self.work.write_report(rank, report)
        return report


def _batches(documents: Any, report: PartReport) -> Iterator[tuple[list[str], int]]:
    """(texts, bytes on disk) of consecutive documents; malformed ones are counted instead."""
    texts: list[str] = []
    characters = size = 0
    for document in documents:
        if MALFORMED in document.metadata:
            report.skipped += 1
            if len(report.reasons) < KEPT_REASONS:
                report.reasons.append(document.metadata[MALFORMED])
            continue
        texts.append(document.text)
        characters += len(document.text)
        size += document.metadata.get("size", 0)
        if len(texts) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield texts, size
            texts, characters, size = [], 0, 0
    if texts:
        yield texts, size


class PartsMerger(PipelineStep):
    """Joins the parts once all are there: the last task of a run on a cluster."""

    type = "💽 - WRITER"
    name = "Megatron indexed dataset, joined"

    def __init__(self, work: WorkFolder, prefix: str, tokenizer: StoredTokenizer) -> None:
        super().__init__()
        self.work, self.prefix, self.tokenizer = work, prefix, tokenizer

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        total = merge_parts(self.work, self.prefix, self.tokenizer)
        self.stat_update("documents", value=total.documents)
        self.stat_update("tokens", value=total.tokens)
        # A later run of the same command begins anew; the logs stay.
        self.work.plan.unlink(missing_ok=True)


def merge_parts(work: WorkFolder, prefix: str, tokenizer: StoredTokenizer) -> PartReport:
    """Join the parts, in order, into ``PREFIX.bin`` and ``PREFIX.idx``; returns the sums of their reports.

    ``.idx`` is renamed into place last, so that its presence proves the pair, and the record beside it, complete.

    Raises:
        UserError: a part is missing or damaged, there is no document in all, or the files cannot be written.
    """
    reports = [_complete_report(work, rank) for rank in range(work.count_parts())]
    total = PartReport()
    for report in reports:
        total.documents += report.documents
        total.tokens += report.tokens
        total.skipped += report.skipped
        total.reasons = (total.reasons + report.reasons)[:KEPT_REASONS]
    if not total.documents:
        also = f" ({total.skipped:,} malformed; the first: {total.reasons[0]})" if total.skipped else ""
        raise UserError(f"--input holds no text{also}; name files with documents in them")
    megatron = megatron_indexed_dataset()
    dtype = megatron.DType.optimal_dtype(tokenizer.id_range)
    bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    joined_bin, joined_idx, record = (work.path / f"joined.{end}" for end in ("bin", "idx", "json"))
    try:
        builder = megatron.IndexedDatasetBuilder(str(joined_bin), dtype=dtype)
        with Progress("joining", sum(work.part(rank).with_suffix(".bin").stat().st_size
                                     for rank in range(len(reports)))) as progress:  # fmt: skip
            for rank, report in enumerate(reports):
                if report.documents:
                    with quiet_megatron():
                        builder.add_index(str(work.part(rank)))
                    progress.advance(report.documents, work.part(rank).with_suffix(".bin").stat().st_size)
        builder.finalize(str(joined_idx))
        made = Preparation(
            tokenizer.id_range, tokenizer.vocabulary, tokenizer.name, digest(work.key()),
            total.documents, total.tokens, total.skipped, joined_bin.stat().st_size, tokenizer.special,
        )  # fmt: skip
        record.write_text(made.to_json(), "utf-8")
        for file in (joined_bin, joined_idx, record):
            sync(file)
        # An old .idx must not stand beside a new .bin, not even for a moment.
        idx_file.unlink(missing_ok=True)
        os.replace(joined_bin, bin_file)
        os.replace(record, f"{prefix}{SUFFIX}")
        os.replace(joined_idx, idx_file)
    except OSError as error:
        joined_bin.unlink(missing_ok=True)
        raise cannot_write(bin_file, error) from error
    return total


def _complete_report(work: WorkFolder, rank: int) -> PartReport:
    report = work.report(rank)
    if report is None or report.finished is None:
        work.forget(rank)
        raise UserError(f"part {rank} in {work.parts} is missing; run the same command again")
    if report.documents:
        try:
            check_indexed_dataset(work.part(rank))
        except UserError as error:
            work.forget(rank)
            raise UserError(f"part {rank} in {work.parts} is damaged; run the same command again") from error
    return report
