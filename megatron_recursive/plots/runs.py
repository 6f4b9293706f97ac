"""Training runs as their metrics.jsonl tell them: what counts of each file, and how far a run was at each record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plots.event_files import find_events, read_events
from megatron_recursive.plots.metrics_file import read_records

FILE, SUBFOLDER = "metrics.jsonl", "checkpoints"


@dataclass(frozen=True)
class Run:
    """A run without what a later start did over again.

    Attributes:
        about: the ``run`` record of its last start; empty where the file has none.
        records: by iteration; with ``tokens``, ``flops`` and ``elapsed`` (seconds, without lost work) where the file
            tells them. Of several held-out sets the first.
        starts: how often it began to train. A start that was refused, or trained nothing, does not count.
        resumed: whether a later one went on from a checkpoint.
    """

    name: str
    file: Path
    about: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    starts: int
    resumed: bool

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Of a kind of record; ``held-out`` are evaluations, or the final test where there were none."""
        if kind == "held-out":
            return self.of("valid") or self.of("test")
        return [r for r in self.records if r["kind"] == kind]

    @property
    def plan(self) -> RecursionPlan | None:
        """At the depth of its last evaluation, which growth and supervision steps change."""
        if "plan" not in self.about:
            return None
        plan = RecursionPlan.from_json(self.about["plan"])
        last = (self.of("held-out") or [{}])[-1]
        return plan.with_blocks(last["recurrence"]) if "recurrence" in last else plan


def read_runs(given: Sequence[str | Path]) -> list[Run]:
    """The runs of files, or of ``--save`` folders or those around them, named by what tells their paths apart.

    Raises:
        UserError: a file is missing or malformed (the message names it and the line), or is named twice.
    """
    files = [_find(Path(each)) for each in given]
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise UserError(f"{given[number]} is named twice; name different runs.")
    return [_read(file, name) for file, name in zip(files, _names(files), strict=True)]


def _find(path: Path) -> Path:
    places = [path / FILE, path / SUBFOLDER / FILE] if path.is_dir() else [path]
    found = next((place for place in places if place.is_file()), None) or find_events(path)
    if found is None and path.is_dir():
        below = sorted({str(each.parent) for depth in ("*", f"*/{SUBFOLDER}") for each in path.glob(f"{depth}/{FILE}")})
        there = f"name {' or '.join(below[:4])}" if below else "name the --save folder of a run"
        raise UserError(f"{path} holds no {FILE}, nor does {path / SUBFOLDER}; {there}.")
    return found or path


def _names(files: Sequence[Path]) -> list[str]:
    """What is left of the paths without their common start and end."""
    paths = [[part for part in file.resolve().parts if part not in (FILE, SUBFOLDER)] for file in files]
    if len({*map(tuple, paths)}) < len(paths):
        paths = [list(file.resolve().parts) for file in files]
    for at in (-1, 0):
        while len({path[at] for path in paths}) == 1 and min(map(len, paths)) > 1:
            paths = [path[1:] if at == 0 or len(paths) == 1 else path[:-1] for path in paths]
    return ["/".join(path) for path in paths]


def _read(file: Path, name: str) -> Run:
    parts: list[list[dict[str, Any]]] = [[]]
    for record in read_records(file) if find_events(file) is None else read_events(file):
        if record["kind"] == "run":
            parts.append([])
        if not record.get("set"):
            parts[-1].append(record)
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    trained: set[tuple[Any, ...]] = set()
    about: dict[str, Any] = {}
    starts, resumed, head = 0, False, dict[str, Any]()
    for part in parts:
        earlier = about
        head = part.pop(0) if part and part[0]["kind"] == "run" else {}
        first = next((r["iteration"] for r in part if r["kind"] == "train"), None)
        if head and first is not None:
            about, starts, resumed = head, starts + 1, resumed or (starts > 0 and head["iteration"] > 0)
            # Records without a time come from versions that wrote 0 as the iteration of every start.
            begin = head["iteration"] + 1 if "time" in head else first
            kept = {key: r for key, r in kept.items() if r["iteration"] < begin}
            trained &= kept.keys()
        elif first is None and about and head.get("plan") != about.get("plan"):
            continue  # evaluated alone, at another depth
        base = max((r["elapsed"] for r in kept.values() if "elapsed" in r), default=None if trained else 0.0)
        facts = about or head
        read, spent = max(((r["tokens"], r["flops"]) for r in kept.values() if "flops" in r), default=(0, 0))
        rate = facts.get("FLOPs per token", 0.0)
        began = head.get("tokens", read)  # of this part, whose FLOPs count from there on
        spent += (began - read) * (earlier or facts).get("FLOPs per token", rate)
        for r in part:
            if "tokens per iteration" in facts:
                r.setdefault("tokens", r["iteration"] * facts["tokens per iteration"])
            if "tokens" in r and "FLOPs per token" in facts:
                r["flops"] = r.get("FLOPs", spent + (r["tokens"] - began) * rate)  # of drawn depths, what was spent
            key = r["kind"], r["iteration"], r.get("alarm")
            if first is None and key in trained:  # what training recorded stays
                continue
            if first is not None:
                trained.add(key)
                if "time" in r and "time" in head and base is not None:
                    r["elapsed"] = base + r["time"] - head["time"]
            kept[key] = r
    # Where nothing was trained, the last start's plan is that of what was evaluated.
    return Run(name, file, about or head, tuple(sorted(kept.values(), key=lambda r: r["iteration"])), starts,
               resumed)  # fmt: skip
