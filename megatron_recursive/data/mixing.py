"""Corpora, mixed by weight and shuffled as one, as Parquet shards of even size: spilled part by part, then written."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_recursive.data.files import cannot_write, replacing
from megatron_recursive.data.hub import HubChoice, revisions
from megatron_recursive.data.joining import add_reports
from megatron_recursive.data.preparation import digest
from megatron_recursive.data.preprocess import SMALL_BYTES, Options, read_something, watched
from megatron_recursive.data.progress import note_count
from megatron_recursive.data.readers import read_span
from megatron_recursive.data.sources import default_part_bytes, find_files, plan_parts, require_packages
from megatron_recursive.data.spills import OVERHEAD, Cuts, Run, bundles, make_cuts, spill
from megatron_recursive.data.statistics import Statistics, lengths_of, most_frequent
from megatron_recursive.data.work_folder import PartReport, WorkFolder, locked, write_replacing
from megatron_recursive.errors import UserError

RECORD = "_mixture.json"  # Arrow and Spark read a folder of Parquet without what begins so
LEFT = "documents left out, since another corpus of the mixture ran out"
LIBRARIES_MB = 256
ROW_GROUP_BYTES = 8 * 2**20
"""Text of a row group, which a reader holds at once."""


@dataclass(frozen=True)
class Mixture:
    """What the shards depend on, besides the documents. ``weights`` are shares of the text in bytes; None takes all."""

    num_shards: int
    weights: Sequence[float] | None = None
    seed: int = 0
    json_key: str = "text"
    on_error: str = "stop"


def mix(
    corpora: Sequence[Sequence[str | Path]], output: str | Path, mixture: Mixture, hub: HubChoice | None = None,
    workers: int = 1, executor: str = "local", executor_options: Mapping[str, str] | None = None,
    memory_mb: int = 1024,
) -> dict[str, Any] | None:  # fmt: skip
    """Write ``DIR/00000.parquet`` and so on; they depend on neither ``workers`` nor ``memory_mb``, that of a process.

    What is complete is kept in ``DIR.partial`` until the end, and the same call goes on from there.

    Returns:
        The record, also in ``DIR/_mixture.json``, or None when the work was only handed to a SLURM cluster.

    Raises:
        UserError: an input is missing, empty, unreadable or (unless ``on_error`` is ``skip``) malformed, the options
            make no sense, or the folder cannot be written or is there already.
    """
    require_packages("datatrove", "orjson", "pyarrow", "zstandard")
    weights, held_bytes = mixture.weights, int((memory_mb - LIBRARIES_MB) * 2**20) // 3
    if weights is not None and (len(weights) != len(corpora) or not all(0 < weight < 1e30 for weight in weights)):
        given = " ".join(f"{weight:g}" for weight in weights)
        raise UserError(f"--weights {given} must be a number above 0 for each --input; there are {len(corpora)}")
    if mixture.num_shards < 1 or workers < 1 or held_bytes < ROW_GROUP_BYTES:
        least = LIBRARIES_MB + 3 * ROW_GROUP_BYTES // 2**20
        raise UserError(f"--num-shards {mixture.num_shards} and --workers {workers} must be 1 or more, and --memory-mb "
                        f"{memory_mb} must be {least} or more, for libraries and a row group")  # fmt: skip
    target = Path(os.path.abspath(output))
    remote = [any(str(given).startswith("hf://") for given in inputs) for inputs in corpora]
    files = [find_files(inputs, hub if here or not any(remote) else None)
             for inputs, here in zip(corpora, remote, strict=True)]  # fmt: skip
    for revision in revisions(file.path for each in files for file in each):
        print(f"reading {revision}", file=sys.stderr, flush=True)
    key = json.loads(json.dumps({"files": [[asdict(file) for file in each] for each in files], **asdict(mixture)}))
    if os.path.lexists(target):
        return _already_there(target, digest(key))
    for each in files:
        read_something(each, mixture.json_key, Options(on_error=mixture.on_error))
    work = WorkFolder(target.with_name(f"{target.name}.partial"))
    task = functools.partial(Task, work, mixture, held_bytes, target)

    def plan() -> list[Any]:
        shutil.rmtree(task("shard").shards.path, ignore_errors=True)
        parts = [plan_parts(each, default_part_bytes(each)) for each in files]
        write_replacing(work.path / "corpora.json", json.dumps([len(each) for each in parts]))
        return [part for each in parts for part in each]

    try:
        with locked(work, str(target)):
            if work.begin(key, plan):
                print("the interrupted run had other inputs or options: starting anew", file=sys.stderr)
            return _run(task, workers, executor, executor_options or {})
    except OSError as error:
        raise cannot_write(target, error) from error


def _already_there(target: Path, source: str) -> dict[str, Any]:
    """The record of the same command's folder."""
    try:
        made = json.loads((target / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        made = {}
    if made.get("source") != source:
        raise UserError(f"--output {target} is there already, and not of these documents and options; name another")
    print(f"{target} was made by this command already: nothing is done (delete it to make it anew)", file=sys.stderr)
    return made


def _run(
    task: Callable[[str], Task], workers: int, executor: str, options: Mapping[str, str]
) -> dict[str, Any] | None:
    from megatron_recursive.data.executors import build_executor

    spilling, writing, publishing = task("spill"), task("shard"), task("publish")
    work, shards, count = spilling.work, writing.shards, writing.mixture.num_shards
    sizes = work.part_sizes()
    shards.parts.mkdir(parents=True, exist_ok=True)
    shards.counts.unlink(missing_ok=True)
    if executor == "local":
        workers = workers if sum(sizes) >= SMALL_BYTES else 1
        with watched("reading", work, sizes):
            build_executor("local", [spilling], len(sizes), workers, work.logs, options).run()
        with watched("writing", shards, writing.sizes()):
            build_executor("local", [writing], count, workers, shards.logs, options).run()
        publishing()
        work.remove()
    else:
        first = build_executor(executor, [spilling], len(sizes), workers, work.logs, options)
        second = build_executor(executor, [writing], count, workers, shards.logs, options, depends=first)
        build_executor(executor, [publishing], 1, 1, work.path / "datatrove-end", options, depends=second).run()
    return None if executor == "slurm" else json.loads((spilling.target / RECORD).read_text("utf-8"))


@dataclass
class Task:
    """A stage as a step of datatrove's, which calls it with the number of the part or shard."""

    work: WorkFolder
    mixture: Mixture
    held_bytes: int
    target: Path
    stage: str

    @property
    def shards(self) -> WorkFolder:
        return WorkFolder(self.work.path / "mixed")

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        report = PartReport(started=time.time())
        try:
            getattr(self, self.stage)(rank, report)
        except OSError as error:
            raise cannot_write(self.target, error) from error
        # The peak of getrusage includes that of the process which forked this one.
        report.peak_bytes = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
        report.finished = time.time()
        if self.stage != "publish":
            (self.work if self.stage == "spill" else self.shards).write_report(rank, report)

    def spill(self, rank: int, report: PartReport) -> None:
        """Read a part and write its documents as runs."""
        reject = functools.partial(report.reject, on_error=self.mixture.on_error)

        def pairs() -> Iterator[tuple[int, bytes]]:
            for span in self.work.read_part(rank):
                for document in read_span(span, self.mixture.json_key, reject):
                    key = hashlib.blake2b(f"{self.mixture.seed} {rank} {report.documents}".encode(), digest_size=8)
                    yield int.from_bytes(key.digest()) >> 1, document.text.encode()
                    report.documents += 1
                    report.bytes += document.size
                    if report.documents % 256 == 0:
                        note_count(self.work.counts, rank, report.documents, report.bytes)

        spill(self.work.part(rank), pairs(), self.held_bytes)

    def shard(self, rank: int, report: PartReport) -> None:
        """Write a shard from the runs of all parts."""
        import pyarrow
        import pyarrow.parquet

        corpora, cuts = self.mixed()
        start, stop = cuts.places[rank : rank + 2]
        documents, size = numpy.diff(cuts.below(corpora, numpy.array([start, stop])).sum(0))[:, 0].tolist()
        pieces = numpy.linspace(start, stop, 2 + (size + documents * OVERHEAD) // self.held_bytes).tolist()
        pairs = (pair for low, high in zip(pieces, pieces[1:], strict=False)
                 for pair in cuts.slice(corpora, low, high))  # fmt: skip
        schema = pyarrow.schema([("text", pyarrow.large_string())])
        with replacing(self.shard_file(rank)) as (file,):
            with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
                for rows in bundles(pairs, ROW_GROUP_BYTES):
                    texts = pyarrow.array([raw for _, raw in rows], schema.field(0).type)
                    writer.write_table(pyarrow.table([texts], schema))
                    report.documents += len(rows)
                    report.bytes += texts.nbytes
                    note_count(self.shards.counts, rank, report.documents, report.bytes)

    def publish(self, rank: int, report: PartReport) -> None:
        """Give the folder its name, when all shards are there."""
        for number in range(self.mixture.num_shards):
            if not self.shard_file(number).is_file():
                self.shards.forget(number)
                raise UserError(f"{self.shard_file(number)} is missing; run the same command again")
        folder = self.shard_file(0).parent
        write_replacing(folder / RECORD, json.dumps(self.record(), indent=1) + "\n")
        os.rename(folder, self.target)
        self.work.plan.unlink()  # a later run begins anew

    def record(self) -> dict[str, Any]:
        """How the mixture was made: shares of its corpora in documents and bytes, and statistics."""
        corpora, cuts = self.mixed()
        taken = cuts.below(corpora, numpy.ones(1))[:, :, 0]
        documents, size = taken.sum(0).tolist()
        parts = [report for rank in range(self.work.count_parts()) if (report := self.work.report(rank))]
        shards = [report for rank in range(self.mixture.num_shards) if (report := self.shards.report(rank))]
        total, key = add_reports(parts), self.work.key() or {}
        left = sum(report.documents for report in parts) - documents
        lengths = lengths_of(numpy.diff(run.index[1, : run.below(numpy.array([top], numpy.uint64))[0, 0] + 1])
                             for runs, top in zip(corpora, cuts.taken, strict=True) for run in runs)  # fmt: skip
        statistics = Statistics(documents, None, lengths, None, {LEFT: left} if left else {},
                                most_frequent(total.malformed), size)  # fmt: skip
        return {
            "source": digest(key),
            "corpora": [
                {"first_file": files[0]["path"], "documents": count, "bytes": its, "share": its / size}
                for files, (count, its) in zip(key["files"], taken.tolist(), strict=True)
            ],
            "statistics": statistics.to_dict(),
            "skipped": total.skipped,
            "peak_memory_mb": max(report.peak_bytes for report in (*parts, *shards)) // 2**20,
        }

    def mixed(self) -> tuple[list[list[Run]], Cuts]:
        """The runs of each corpus, and what is made of them: computed by the first that asks."""
        found = dict[int, list[Run]]()
        for text in sorted(self.work.parts.glob("*.text")):
            found.setdefault(int(text.name.partition("-")[0]), []).append(Run.open(text))
        ranks = itertools.count()
        corpora = [[run for rank in itertools.islice(ranks, parts) for run in found.get(rank, [])]
                   for parts in json.loads((self.work.path / "corpora.json").read_text("utf-8"))]  # fmt: skip
        file = self.shards.path / "cuts.json"
        if not file.exists():
            documents = sum(run.index.shape[1] - 1 for runs in corpora for run in runs)
            if documents < self.mixture.num_shards:
                raise UserError(f"--num-shards {self.mixture.num_shards} is more than there are documents, {documents}")
            write_replacing(file, json.dumps(asdict(make_cuts(corpora, self.mixture.weights, self.mixture.num_shards))))
        return corpora, Cuts(**json.loads(file.read_text("utf-8")))

    def sizes(self) -> list[int]:
        """Bytes of text of each shard."""
        corpora, cuts = self.mixed()
        return numpy.diff(cuts.below(corpora, numpy.array(cuts.places))[:, 1].sum(0)).tolist()

    def shard_file(self, rank: int) -> Path:
        return self.shards.path / "files" / f"{rank:05d}.parquet"
