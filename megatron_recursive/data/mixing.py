"""Corpora, mixed by weight and shuffled as one, as Parquet shards of even size."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_recursive.data.files import cannot_write
from megatron_recursive.data.hub import HubChoice, revisions
from megatron_recursive.data.mix_task import RECORD, ROW_GROUP_BYTES, Mixture, Task
from megatron_recursive.data.preparation import digest
from megatron_recursive.data.preprocess import SMALL_BYTES, Options, read_something, watched
from megatron_recursive.data.sources import default_part_bytes, find_files, plan_parts, require_packages
from megatron_recursive.data.work_folder import WorkFolder, locked, write_replacing
from megatron_recursive.errors import UserError

LIBRARIES_MB = 256


def mix(
    corpora: Sequence[Sequence[str | Path]], output: str | Path, mixture: Mixture, hub: HubChoice | None = None,
    workers: int = 1, executor: str = "local", executor_options: Mapping[str, str] | None = None,
    memory_mb: int = 1024,
) -> dict[str, Any] | None:  # fmt: skip
    """Write ``DIR/00000.parquet`` and so on; they depend on neither ``workers`` nor ``memory_mb``, that of a process.

    What is complete is kept in ``DIR.partial`` until the end, and the same call goes on from there.

    Returns:
        The record, also in ``DIR/mixture.json``, or None when the work was only handed to a SLURM cluster.

    Raises:
        UserError: an input is missing, empty, unreadable or (unless ``on_error`` is ``skip``) malformed, the options
            make no sense, or the folder cannot be written or is there already.
    """
    require_packages("datatrove", "orjson", "pyarrow", "zstandard")
    mixture.check(len(corpora))
    held_bytes = int((memory_mb - LIBRARIES_MB) * 2**20) // 3
    if workers < 1 or held_bytes < ROW_GROUP_BYTES:
        least = LIBRARIES_MB + 3 * ROW_GROUP_BYTES // 2**20
        raise UserError(f"--workers must be 1 or more, and --memory-mb {least} or more, for libraries and a row group")
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


def _run(task: Any, workers: int, executor: str, options: Mapping[str, str]) -> dict[str, Any] | None:
    from megatron_recursive.data.executors import build_executor

    spill, shard, publish = task("spill"), task("shard"), task("publish")
    work, shards, num_shards = spill.work, shard.shards, spill.mixture.num_shards
    sizes = work.part_sizes()
    shards.parts.mkdir(parents=True, exist_ok=True)
    shards.counts.unlink(missing_ok=True)
    if executor == "local":
        workers = workers if sum(sizes) >= SMALL_BYTES else 1
        with watched("reading", work, sizes):
            build_executor("local", [spill], len(sizes), workers, work.logs, options).run()
        with watched("writing", shards, shard.sizes()):
            build_executor("local", [shard], num_shards, workers, shards.logs, options).run()
        publish()
        work.remove()
    else:
        first = build_executor(executor, [spill], len(sizes), workers, work.logs, options)
        second = build_executor(executor, [shard], num_shards, workers, shards.logs, options, depends=first)
        build_executor(executor, [publish], 1, 1, work.path / "datatrove-end", options, depends=second).run()
    return None if executor == "slurm" else json.loads((spill.target / RECORD).read_text("utf-8"))


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
