"""Training runs as their metrics.jsonl tell them: what counts of each file, and how far a run was at each record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plots.metrics_file import read_records

FILE, SUBFOLDER = "metrics.jsonl", "checkpoints"


@dataclass(frozen=True)
class Run:
    """A run without what a later start did over again.

    Attributes:
        about: the ``run`` record of its last start; empty where the file has none.
        records: by iteration; each has ``tokens``, ``flops`` and ``elapsed`` (seconds in training, evaluation and
            saves, but not those of lost work) where the file tells them.
        starts: how often it began to train. A start that was refused, or trained nothing, does not count.
    """

    name: str
    file: Path
    about: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    starts: int

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in self.records if r["kind"] == kind and not r.get("set")]  # the first of several held-out sets

    @property
    def held_out(self) -> list[dict[str, Any]]:
        return self.of("valid") or self.of("test")

    @property
    def plan(self) -> RecursionPlan | None:
        return RecursionPlan.from_json(self.about["plan"]) if "plan" in self.about else None


def read_runs(given: Sequence[str | Path]) -> list[Run]:
    """The runs of folders or files, named by what tells their paths apart.

    Raises:
        UserError: a file is missing or malformed (the message names it and the line), or is named twice.
    """
    files = [find_metrics(each) for each in given]
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise UserError(f"{given[number]} is named twice; name different runs.")
    return [_read(file, name) for file, name in zip(files, _names(files), strict=True)]


def find_metrics(given: str | Path) -> Path:
    """The metrics of a run: the file itself, or that of a ``--save`` folder or of the folder around it."""
    path = Path(given)
    if not path.is_dir():
        return path
    near = [place / FILE for place in (path, path / SUBFOLDER) if (place / FILE).is_file()]
    below = sorted(each.parent for pattern in ("*", f"*/{SUBFOLDER}") for each in path.glob(f"{pattern}/{FILE}"))
    if near or len(below) == 1:
        return near[0] if near else below[0] / FILE
    if below:
        raise UserError(f"{given} holds several runs; name one or more of {', '.join(map(str, below[:8]))}.")
    raise UserError(f"{given} holds no {FILE}, nor does {path / SUBFOLDER}; name the --save folder of a run.")


def _names(files: Sequence[Path]) -> list[str]:
    """What is left of the paths without their common start and end."""
    paths = [list(file.resolve().parts) for file in files]
    for end in (FILE, SUBFOLDER):
        shorter = [path[:-1] if path[-1] == end else path for path in paths]
        paths = shorter if len(set(map(tuple, shorter))) == len(files) else paths
    for at in (-1, 0) if len(files) > 1 else ():
        while len({path[at] for path in paths}) == 1 and min(map(len, paths)) > 1:
            paths = [path[1:] if at == 0 else path[:-1] for path in paths]
    return ["/".join(path if len(files) > 1 else path[-1:]) for path in paths]


def _read(file: Path, name: str) -> Run:
    parts: list[list[dict[str, Any]]] = [[]]
    for record in read_records(file):
        if record["kind"] == "run":
            parts.append([])
        parts[-1].append(record)
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    about: dict[str, Any] = {}
    starts = 0
    for part in parts:
        head = part.pop(0) if part and part[0]["kind"] == "run" else {}
        first = next((r["iteration"] for r in part if r["kind"] == "train"), None)
        if head and first is not None:
            about, starts = head, starts + 1
            # Records without a time come from versions that wrote 0 as the iteration of every start.
            begin = head["iteration"] + 1 if "time" in head else first
            kept = {key: r for key, r in kept.items() if r["iteration"] < begin}
        base = max((r["elapsed"] for r in kept.values() if "elapsed" in r), default=None if kept else 0.0)
        for r in part:
            if "tokens per iteration" in (about or head):
                r.setdefault("tokens", r["iteration"] * (about or head)["tokens per iteration"])
            if "tokens" in r and "FLOPs per token" in (about or head):
                r["flops"] = r["tokens"] * (about or head)["FLOPs per token"]
            if "time" in r and "time" in head and base is not None:
                r["elapsed"] = base + r["time"] - head["time"]
            kept[r["kind"], r["iteration"], r.get("set"), r.get("alarm")] = r
    return Run(name, file, about, tuple(sorted(kept.values(), key=lambda r: r["iteration"])), starts)
