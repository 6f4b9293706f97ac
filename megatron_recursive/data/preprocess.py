"""From documents to a Megatron dataset: the parts are tokenized at the same time, then joined in order."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_recursive.data.chat.formats import iter_conversations
from megatron_recursive.data.chat.options import ChatOptions
from megatron_recursive.data.chat.templates import store_chat_tokenizer
from megatron_recursive.data.files import cannot_write
from megatron_recursive.data.hub import HubChoice, revisions
from megatron_recursive.data.indexed import check_indexed_dataset, read_lengths
from megatron_recursive.data.insertion import Surroundings, source_digest, steps_of
from megatron_recursive.data.joining import SUPERVISED, TOKENIZER, add_reports, data_args_file, finish, listed_parts
from megatron_recursive.data.preparation import digest, read_preparation
from megatron_recursive.data.progress import Progress, read_counts
from megatron_recursive.data.readers import iter_documents, refuse
from megatron_recursive.data.sources import (
    TEXT_DOCUMENT_BYTES,
    SourceFile,
    default_part_bytes,
    find_files,
    plan_parts,
    require_packages,
    unpacked_name,
    whole,
)
from megatron_recursive.data.statistics import Statistics, add_malformed, lengths_of, most_frequent
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

    ``files`` are ``.bin`` and ``.idx``, or the list of the parts that were not joined.
    """

    files: tuple[Path, ...]
    documents: int
    tokens: int
    skipped: int = 0
    statistics: Statistics | None = None


@dataclass(frozen=True)
class Options:
    """What the documents of a dataset go through, and where its parts end.

    ``on_error``: ``stop`` at a malformed document, or ``skip`` and count it. ``join``: one dataset, or one for each
    part and their list. ``pipeline``: ``MODULE:FUNCTION`` with steps between reading and tokenizing.
    """

    append_eod: bool = True
    on_error: str = "stop"
    join: bool = True
    pipeline: str | None = None
    part_bytes: int | None = None
    chat: ChatOptions | None = None


def preprocess_keys(
    json_keys: Sequence[str], inputs: Sequence[str | Path], prefix: str | Path, hub: HubChoice | None = None,
    options: Options = Options(), **others: Any,
) -> list[IndexedSummary | None]:  # fmt: skip
    """:func:`preprocess` for each of several keys, into ``PREFIX_KEY_document``, as Megatron names them.

    All keys are looked for before the first is done. The files are read once for each.
    """
    files, start = find_files(inputs, hub), _checked_prefix(str(prefix))
    for key in json_keys:
        read_something(files, key, options)
    names = [f"{start}_{key}_document" for key in json_keys]
    return [
        preprocess(files, name, json_key=key, options=options, **others)
        for name, key in zip(names, json_keys, strict=True)
    ]


def preprocess(
    inputs: Sequence[str | Path | SourceFile],
    prefix: str | Path,
    tokenizer: str | Path | TokenizerChoice,
    json_key: str = "text",
    workers: int = 1,
    executor: str = "local",
    executor_options: Mapping[str, str] | None = None,
    overwrite: bool = False,
    hub: HubChoice | None = None,
    options: Options = Options(),
) -> IndexedSummary | None:
    """Tokenize documents into ``PREFIX.bin`` and ``PREFIX.idx``; the files do not depend on ``workers``.

    Complete parts are kept in ``PREFIX.partial`` until the end, and the same call goes on from them. Once done, it does
    nothing; another one needs ``overwrite``.

    Returns:
        What was written, or None when the work was only handed to a SLURM cluster.

    Raises:
        UserError: an input is missing, empty, unreadable or (unless ``on_error`` is ``skip``) malformed, the tokenizer
            is missing or has no end-of-document token, or the files cannot be written or are there already.
    """
    prefix = os.path.abspath(_checked_prefix(str(prefix)))
    if workers < 1:
        raise UserError(f"--workers {workers} is not a number of processes; give 1 or more")
    if not options.join and len(prefix.split()) != 1:
        raise UserError(f"--no-join writes a list in which {prefix} would be several words; choose another --output")
    require_packages("datatrove", "orjson", "pyarrow", "zstandard")
    choice = tokenizer if isinstance(tokenizer, TokenizerChoice) else TokenizerChoice(str(tokenizer))
    files = find_files(inputs, hub)
    for revision in revisions(file.path for file in files):
        print(f"reading {revision}", file=sys.stderr, flush=True)
    long = [f for f in files if f.path.lower().endswith(".txt") and f.size > TEXT_DOCUMENT_BYTES and not options.chat]
    if long:
        print(f"{long[0].path}{f' and {len(long) - 1} more' if long[1:] else ''}: text of more than 4 MiB becomes "
              "several documents, cut every 4 MiB at a line end", file=sys.stderr, flush=True)  # fmt: skip
    work = WorkFolder(Path(f"{prefix}.partial"))
    part_bytes = options.part_bytes or default_part_bytes(files)
    store = partial(store_chat_tokenizer, target=f"{prefix}{TOKENIZER}") if options.chat else store_tokenizer

    def key(stored: StoredTokenizer) -> dict[str, Any]:
        return {**_key(files, stored, json_key, options), "part_bytes": part_bytes}

    there = [Path(f"{prefix}.{end}") for end in ("bin", "idx")] if options.join else [data_args_file(prefix)]
    if options.chat:
        there += [Path(f"{prefix}{SUPERVISED}.{end}") for end in ("bin", "idx")]
        if texts := [file.path for file in files if unpacked_name(file.path).endswith(".txt")]:
            raise UserError(f"--input holds {texts[0]}, which is text and no conversations; name the other files alone")
    grown = [Path(f"{prefix}{TOKENIZER}")] if options.chat else []
    if not overwrite and any(map(os.path.lexists, [*there, *grown])):
        with tempfile.TemporaryDirectory() as folder:
            asked = key(store(choice, Path(folder)))
        if work.key() != asked:  # the plan of an interrupted run that was to write these files: go on with it
            return _already_there(prefix, there, digest(asked))
    # A mistake in the first lines is reported before the slow start of the workers.
    read_something(files, json_key, options)
    try:
        with locked(work, prefix):
            stored = store(choice, work.path)
            if options.append_eod and stored.eod is None and not options.chat:
                raise UserError(f"the tokenizer {choice} has no end-of-document token; set one or pass --no-append-eod")
            if work.begin(key(stored), lambda: plan_parts(files, part_bytes, ".json" if options.chat else ".parquet")):
                print("the interrupted run had other inputs, options or tokenizer: starting anew", file=sys.stderr)
            _take_up(work, options.on_error)
            run = _Run(work, prefix, stored, json_key, options, workers, there)
            if executor == "local":
                return run.here()
            return run.on_cluster(executor, executor_options or {})
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


def _already_there(prefix: str, there: list[Path], source: str) -> IndexedSummary:
    """What an earlier run of the same command made; refuses files of another one, or damaged ones."""
    prefixes = [prefix] if len(there) > 1 else listed_parts(prefix)
    masks = [str(file.with_suffix("")) for file in there[2:]][:1]
    grown = [Path(f"{prefix}{TOKENIZER}")] if masks else []
    made = [each for name in prefixes if (each := read_preparation(name)) is not None]
    other = any(each.source != source for each in made)
    if other or not made or len(made) < len(prefixes):
        how = "made of other documents, with another tokenizer or options" if other else "made otherwise"
        names = " or ".join(file.name.removeprefix(Path(prefix).name) for file in [*there, *grown])
        raise UserError(f"--output {prefix}: {names} is there already, {how}; name another, or add --overwrite")
    try:
        for name in prefixes + masks:
            check_indexed_dataset(name)
        if grown and not grown[0].is_dir():
            raise UserError(f"the tokenizer's folder {grown[0]} is gone; prepare the data again")
    except UserError as error:
        raise UserError(f"--output {prefix} was made by this command, but {error} (--overwrite)") from error
    print(f"{prefix} was made by this command already: nothing is done (--overwrite makes it anew)", file=sys.stderr)
    documents, tokens, skipped = (sum(getattr(each, name) for each in made)
                                  for name in ("documents", "tokens", "skipped"))  # fmt: skip
    return IndexedSummary(tuple(there), documents, tokens, skipped, _statistics(prefixes))


def _statistics(prefixes: Sequence[str]) -> Statistics | None:
    """Of all parts together, by their records; None where one has none."""
    made = [each.statistics for name in prefixes if (each := read_preparation(name)) is not None]
    if len(made) < len(prefixes) or not all(made):
        return None
    if len(made) == 1:
        return Statistics(**made[0])
    lengths = lengths_of(piece for name in prefixes for piece in read_lengths(Path(f"{name}.idx")))
    malformed = add_malformed({m["what"]: (m["count"], m["first"]) for m in each["malformed"]} for each in made)
    documents, tokens = (sum(each[name] for each in made) for name in ("documents", "tokens"))
    return Statistics(documents, tokens, lengths, malformed=most_frequent(malformed))


def read_something(files: Sequence[SourceFile], json_key: str, options: Options) -> None:
    """Read up to the first document.

    Raises:
        UserError: there is none, or a malformed one is before it.
    """
    rejected: list[UserError] = []
    reject = refuse if options.on_error == "stop" else rejected.append
    documents: Iterator[Any] = iter_documents(files, json_key, reject)
    if (chat := options.chat) is not None:
        documents = (each for file in files for each in iter_conversations(whole(file), chat, reject))
    for _ in documents:
        return
    also = f" ({len(rejected):,} documents are malformed; the first: {rejected[0]})" if rejected else ""
    what = "conversation" if options.chat else "text"
    raise UserError(f"--input holds no {what}{also}; name files with documents in them")


def _key(files: Sequence[SourceFile], tokenizer: StoredTokenizer, json_key: str, options: Options) -> dict[str, Any]:
    """What the parts depend on: with another key, those of an earlier run are of no use."""
    return {
        "files": [asdict(file) for file in files],
        "tokenizer": tokenizer.digest,
        "json_key": json_key,
        "eod": tokenizer.eod if options.append_eod else None,
        **({"special_tokens": True} if tokenizer.special else {}),
        **({} if options.join else {"join": False}),
        **({"chat": asdict(options.chat)} if options.chat else {}),
        **({"pipeline": [options.pipeline, source_digest(options.pipeline)]} if options.pipeline else {}),
    }


def _take_up(work: WorkFolder, on_error: str) -> None:
    if on_error == "stop":
        for rank in work.completed():
            report = work.report(rank)
            if report is None or report.skipped:
                work.forget(rank)
    if done := len(work.completed()):
        print(f"{done} of {work.count_parts()} parts are complete from an interrupted run", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Run:
    """One run of the pipeline over the parts of the work folder."""

    work: WorkFolder
    prefix: str
    tokenizer: StoredTokenizer
    json_key: str
    options: Options
    workers: int
    there: list[Path]

    def here(self) -> IndexedSummary:
        """Run in processes of this machine."""
        from megatron_recursive.data.executors import build_executor

        sizes = self.work.part_sizes()
        workers = 1 if sum(sizes) < SMALL_BYTES else self.workers
        steps = self._steps(workers)
        with watched("encoding", self.work, sizes):
            build_executor("local", steps, len(sizes), workers, self.work.logs, {}).run()
        total = finish(self.work, self.prefix, self.tokenizer, self.options.join)
        self.work.remove()
        return self._summary(total)

    def on_cluster(self, kind: str, options: Mapping[str, str]) -> IndexedSummary | None:
        """Submit to SLURM, or run on Ray: the parts, and a last task that joins them."""
        from megatron_recursive.data.executors import build_executor
        from megatron_recursive.data.steps import PartsMerger

        sizes = self.work.part_sizes()
        first = build_executor(kind, self._steps(self.workers), len(sizes), self.workers, self.work.logs, options)
        merger = PartsMerger(self.work, self.prefix, self.tokenizer, self.options.join)
        join_logs = self.work.path / "datatrove-join"
        last = build_executor(kind, [merger], 1, 1, join_logs, options, depends=first)
        if kind == "slurm":
            last.run()
            return None
        with watched("encoding", self.work, sizes):
            last.run()
        return self._summary(add_reports([self.work.report(rank) or PartReport() for rank in range(len(sizes))]))

    def _steps(self, workers: int) -> list[Any]:
        from megatron_recursive.data.steps import IndexedDatasetWriter, PartReader

        if self.options.chat:
            from megatron_recursive.data.chat.steps import ChatWriter, ConversationReader

            conversations = ConversationReader(self.work, self.options.on_error, self.options.chat)
            return [conversations, ChatWriter(conversations, self.tokenizer)]
        reader = PartReader(self.work, self.json_key, self.options.on_error)
        around = Surroundings(reader, self.work.count_parts(), workers, self.work.inserted)
        inserted = steps_of(self.options.pipeline, around) if self.options.pipeline else []
        return [reader, *inserted, IndexedDatasetWriter(reader, self.tokenizer, self.options.append_eod)]

    def _summary(self, total: PartReport) -> IndexedSummary:
        statistics = _statistics([self.prefix] if self.options.join else listed_parts(self.prefix))
        return IndexedSummary(tuple(self.there), total.documents, total.tokens, total.skipped, statistics)


@contextmanager
def watched(label: str, work: WorkFolder, sizes: list[int]) -> Iterator[None]:
    """Show the workers' progress, from what they count, while the block runs."""
    done_bytes = sum(sizes[rank] for rank in work.completed())
    stop = threading.Event()

    def watch() -> None:
        with Progress(label, sum(sizes), done_bytes=done_bytes) as progress:
            while not stop.wait(_POLL_S):
                documents, size = read_counts(work.counts)
                progress.advance(documents - progress.documents, size - progress.bytes)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
