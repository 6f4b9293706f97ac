"""From documents to a Megatron dataset: the parts are tokenized at the same time, then joined in order."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_recursive.data.files import cannot_write
from megatron_recursive.data.indexed import check_indexed_dataset
from megatron_recursive.data.preparation import digest, read_preparation
from megatron_recursive.data.progress import Progress
from megatron_recursive.data.readers import read_span, refuse
from megatron_recursive.data.sources import SourceFile, find_files, plan_parts, require_packages
from megatron_recursive.data.spans import Span
from megatron_recursive.data.tokenizer import StoredTokenizer, TokenizerChoice, store_tokenizer
from megatron_recursive.data.work_folder import PartReport, WorkFolder, locked
from megatron_recursive.errors import UserError

ON_ERROR = ("stop", "skip")
EXECUTORS = ("local", "slurm", "ray")
SMALL_BYTES = 16 * 2**20
"""A smaller input is done by one process: it takes less than other processes take to start."""
_POLL_S = 0.5


@dataclass(frozen=True)
class IndexedSummary:
    """What :func:`preprocess` wrote; tokens include the end-of-document tokens.

    ``reasons`` are the first of the ``skipped`` malformed documents', with file and line.
    """

    bin_file: Path
    idx_file: Path
    documents: int
    tokens: int
    skipped: int = 0
    reasons: tuple[str, ...] = ()


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: str | Path | TokenizerChoice,
    json_key: str = "text",
    workers: int = 1,
    append_eod: bool = True,
    on_error: str = "stop",
    executor: str = "local",
    executor_options: Mapping[str, str] | None = None,
    part_bytes: int | None = None,
    overwrite: bool = False,
) -> IndexedSummary | None:
    """Tokenize documents into ``PREFIX.bin`` and ``PREFIX.idx``; the files do not depend on ``workers``.

    Complete parts are kept in ``PREFIX.partial`` until the end, and the same call goes on from them. Once done, it does
    nothing; another one needs ``overwrite``.

    Returns:
        What was written, or None when the work was only handed to a SLURM cluster.

    Raises:
        UserError: an input is missing, empty or (unless ``on_error`` is ``skip``) malformed, the tokenizer is missing
            or has no end-of-document token, or the files cannot be written or are there already.
    """
    prefix = os.path.abspath(_checked_prefix(str(prefix)))
    if workers < 1:
        raise UserError(f"--workers {workers} is not a number of processes; give 1 or more")
    require_packages("datatrove", "orjson", "pyarrow", "zstandard")
    choice = tokenizer if isinstance(tokenizer, TokenizerChoice) else TokenizerChoice(str(tokenizer))
    files = find_files(inputs)
    parts = plan_parts(files, part_bytes)
    work = WorkFolder(Path(f"{prefix}.partial"))

    def key(stored: StoredTokenizer) -> dict[str, Any]:
        return {**_key(files, stored, json_key, append_eod), "parts": len(parts)}

    if not overwrite and any(os.path.lexists(f"{prefix}.{end}") for end in ("bin", "idx")):
        with tempfile.TemporaryDirectory() as folder:
            asked = key(store_tokenizer(choice, Path(folder)))
        if work.key() != asked:  # the plan of an interrupted run that was to write these files: go on with it
            return _already_there(prefix, digest(asked))
    # A mistake in the first lines is reported before the slow start of the workers.
    _read_something(parts, json_key, on_error)
    try:
        with locked(work, prefix):
            stored = store_tokenizer(choice, work.path)
            if append_eod and stored.eod is None:
                raise UserError(f"the tokenizer {choice} has no end-of-document token; set one or pass --no-append-eod")
            _begin(work, key(stored), parts, on_error)
            run = _Run(work, prefix, stored, json_key, append_eod, on_error, parts)
            if executor == "local":
                return run.here(workers)
            return run.on_cluster(executor, workers, executor_options or {})
    except OSError as error:
        raise cannot_write(Path(f"{prefix}.bin"), error) from error


def parse_options(options: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` texts as a mapping.

    Raises:
        UserError: one is not of that form.
    """
    for option in options:
        if "=" not in option:
            raise UserError(f"--executor-options {option} must be NAME=VALUE")
    return dict(option.split("=", 1) for option in options)


def _checked_prefix(prefix: str) -> str:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            raise UserError(f"--output {prefix} is a file name; give the prefix without {suffix}")
    if prefix.endswith("/"):
        raise UserError(f"--output {prefix} is a folder; give a prefix in it, such as {prefix}train")
    return prefix


def _already_there(prefix: str, source: str) -> IndexedSummary:
    """What an earlier run of the same command made; refuses files of another one, or damaged ones."""
    made = read_preparation(prefix)
    if made is None or made.source != source:
        how = "made otherwise" if made is None else "made of other documents, with another tokenizer or options"
        raise UserError(f"--output {prefix}: .bin or .idx is there already, {how}; name another, or add --overwrite")
    try:
        check_indexed_dataset(prefix)
    except UserError as error:
        raise UserError(f"--output {prefix} was made by this command, but {error} (--overwrite)") from error
    print(f"{prefix} was made by this command already: nothing is done (--overwrite makes it anew)", file=sys.stderr)
    files = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    return IndexedSummary(*files, made.documents, made.tokens, made.skipped)


def _read_something(parts: list[list[Span]], json_key: str, on_error: str) -> None:
    """Read up to the first document.

    Raises:
        UserError: there is none, or a malformed one is before it.
    """
    rejected: list[UserError] = []
    reject = refuse if on_error == "stop" else rejected.append
    for span in itertools.chain.from_iterable(parts):
        for _ in read_span(span, json_key, reject):
            return
    also = f" ({len(rejected):,} documents are malformed; the first: {rejected[0]})" if rejected else ""
    raise UserError(f"--input holds no text{also}; name files with documents in them")


def _key(files: Sequence[SourceFile], tokenizer: StoredTokenizer, json_key: str, append_eod: bool) -> dict[str, Any]:
    """What the parts depend on: with another key, those of an earlier run are of no use."""
    return {
        "files": [asdict(file) for file in files],
        "tokenizer": tokenizer.digest,
        "json_key": json_key,
        "eod": tokenizer.eod if append_eod else None,
        **({"special_tokens": True} if tokenizer.special else {}),
    }


def _begin(work: WorkFolder, key: dict[str, Any], parts: list[list[Span]], on_error: str) -> None:
    if work.begin(key, parts):
        print("the inputs or the tokenizer are not those of the interrupted run: starting anew", file=sys.stderr)
    if on_error == "stop":
        for rank in work.completed():
            report = work.report(rank)
            if report is None or report.skipped:
                work.forget(rank)
    if done := len(work.completed()):
        print(f"{done} of {len(parts)} parts are complete from an interrupted run", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Run:
    """One run of the pipeline over the parts of the work folder."""

    work: WorkFolder
    prefix: str
    tokenizer: StoredTokenizer
    json_key: str
    append_eod: bool
    on_error: str
    parts: list[list[Span]]

    def here(self, workers: int) -> IndexedSummary:
        """Run in processes of this machine."""
        from megatron_recursive.data.executors import build_executor
        from megatron_recursive.data.steps import merge_parts

        if sum(span.size for part in self.parts for span in part) < SMALL_BYTES:
            workers = 1
        with _watched(self.work, self.parts):
            build_executor("local", self._steps(), len(self.parts), workers, self.work.logs, {}).run()
        total = merge_parts(self.work, self.prefix, self.tokenizer)
        self.work.remove()
        return self._summary(total)

    def on_cluster(self, kind: str, workers: int, options: Mapping[str, str]) -> IndexedSummary | None:
        """Submit to SLURM, or run on Ray: the parts, and a last task that joins them."""
        from megatron_recursive.data.executors import build_executor
        from megatron_recursive.data.steps import PartsMerger

        first = build_executor(kind, self._steps(), len(self.parts), workers, self.work.logs, options)
        merger = PartsMerger(self.work, self.prefix, self.tokenizer)
        join_logs = self.work.path / "datatrove-join"
        last = build_executor(kind, [merger], 1, 1, join_logs, options, depends=first)
        if kind == "slurm":
            last.run()
            return None
        with _watched(self.work, self.parts):
            last.run()
        total = PartReport()
        for rank in range(len(self.parts)):
            report = self.work.report(rank) or PartReport()
            total.documents += report.documents
            total.tokens += report.tokens
            total.skipped += report.skipped
            total.reasons += report.reasons
        return self._summary(total)

    def _steps(self) -> list[Any]:
        from megatron_recursive.data.steps import IndexedDatasetWriter, PartReader

        return [
            PartReader(self.work, self.json_key, self.on_error),
            IndexedDatasetWriter(self.work, self.tokenizer, self.append_eod),
        ]

    def _summary(self, total: PartReport) -> IndexedSummary:
        return IndexedSummary(
            bin_file=Path(f"{self.prefix}.bin"),
            idx_file=Path(f"{self.prefix}.idx"),
            documents=total.documents,
            tokens=total.tokens,
            skipped=total.skipped,
            reasons=tuple(total.reasons),
        )


@contextmanager
def _watched(work: WorkFolder, parts: list[list[Span]]) -> Iterator[None]:
    """Show the workers' progress, from the reports that they write, while the block runs."""
    sizes = [sum(span.size for span in part) for part in parts]
    complete = set(work.completed())
    stop = threading.Event()

    def watch() -> None:
        done_bytes = sum(sizes[rank] for rank in complete)
        with Progress("encoding", sum(sizes), done_bytes=done_bytes) as progress:
            while not stop.wait(_POLL_S):
                documents, size = _read_so_far(work, complete)
                progress.advance(documents - progress.documents, size - progress.bytes)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _read_so_far(work: WorkFolder, without: set[int]) -> tuple[int, int]:
    """Documents and bytes read, without those of the parts ``without``."""
    documents = size = 0
    for file in work.parts.glob("*.json"):
        rank = int(file.stem)
        if rank not in without and (report := work.report(rank)) is not None:
            documents += report.documents
            size += report.bytes
    return documents, size
