"""What there is to tell of a run or a model: its metrics, and what other commands have left beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plots.event_files import find_events
from megatron_recursive.plots.records import kind_of
from megatron_recursive.plots.run_summary import summarize_runs
from megatron_recursive.plots.runs import FILE, SUBFOLDER, read_runs

OUTPUTS = ("runs/sweep.json", "runs/health.json", "runs/layers.json")  # where those commands write unless told
WEIGHTS = ("latest_checkpointed_iteration.txt", "metadata.json", "config.json")  # one is in a folder that holds some


@dataclass
class Subject:
    """A run, a model, or both.

    Attributes:
        folder: it and what belongs to it. model: its weights, as commands take them; None where there are none.
        figures: those of ``summarize``; empty of a model without a run.
        found: by kind: the records of ``health`` and ``layers``, of ``sweep`` that of this model, of ``count`` if it
            was made; ``scores``, of lm-eval by depth; ``samples``, of ``generate --show-recursive-steps --json``.
    """

    given: str
    folder: Path
    name: str
    model: str | None
    plan: RecursionPlan | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    def owns(self, model: str | None, *, at_home: bool) -> bool:
        """Whether this is the model of a record; ``at_home``, also one that is nameless or gone."""
        if model is None or not Path(model).exists():
            return at_home
        return Path(model).resolve().is_relative_to(self.folder.resolve())


def find_subjects(given: Sequence[str], results: Sequence[str] = ()) -> tuple[list[Subject], list[str]]:
    """Runs, as ``summarize`` takes them, and models, with their records; and what is said of runs side by side.

    Args:
        results: further files and folders of records.

    Raises:
        UserError: one is neither run nor model, or a file is malformed.
    """
    subjects = []
    for name in given:
        path = Path(name)
        model = name if path.suffix == ".gguf" else None
        model = model or next((str(at) for at in (path / SUBFOLDER, path) for each in WEIGHTS if (at / each).is_file()), None)
        folder = path if path.is_dir() else path.parent
        own = folder.resolve().parent if folder.name == SUBFOLDER else folder.resolve()
        subjects.append(Subject(name, folder, own.name, model))
    runs = {each.given: each for each in subjects if _has_metrics(Path(each.given))}
    if lost := [each.given for each in subjects if each.given not in runs and each.model is None]:
        raise UserError(f"{lost[0]} is neither a run nor a model; name a --save folder, or a Hugging Face folder.")
    summary: dict[str, Any] = summarize_runs([*runs])[1] if runs else {"runs": [], "comparisons": []}
    for each, run, figures in zip(runs.values(), read_runs([*runs]), summary["runs"], strict=True):
        each.name, each.plan, each.figures = run.name, run.plan, figures
    for each in subjects:
        alone = len(subjects) == 1
        collect(each, [Path(file) for file in OUTPUTS if Path(file).is_file()], at_home=False)
        collect(each, _files(map(Path, results)), at_home=alone)
        collect(each, _files([each.folder]), at_home=True)
    return subjects, [each["said"] for each in summary["comparisons"]]


def _has_metrics(path: Path) -> bool:
    places = (path / FILE, path / SUBFOLDER / FILE)
    return (path.is_file() and path.suffix != ".gguf") or any(each.is_file() for each in places) or find_events(path) is not None


def _files(places: Iterable[Path]) -> list[Path]:
    """Those that may be records, the newest last: the named ones, of a folder those in it, and lm-eval's below."""
    found = set[Path]()
    for place in places:
        found |= {place} if place.is_file() else {*place.glob("*.json*"), *(place / SUBFOLDER).glob("*.json")}
        found |= {*place.rglob("results_*.json"), *place.rglob("depths_*.json")}
    return sorted((each for each in found if each.name != FILE), key=lambda file: file.stat().st_mtime)


def collect(subject: Subject, files: Iterable[Path], *, at_home: bool) -> None:
    """Read what files hold of a subject; later ones count."""
    for file in files:
        try:
            with file.open(encoding="utf-8") as stream:
                if file.suffix == ".jsonl":
                    steps = stream if '"blocks"' in stream.readline() else ()
                    stream.seek(0)
                    records = [("samples", None, [json.loads(line) for line in steps])] if steps else []
                else:
                    records = _parts(json.load(stream))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {file} as JSON ({error}); remove it, or write it again.") from error
        subject.found |= {kind: part for kind, model, part in records if subject.owns(model, at_home=at_home)}


def _parts(record: Any) -> list[tuple[str, str | None, Any]]:
    """(kind, model, record) of what a file of JSON holds."""
    kind = kind_of(record)
    if kind is not None:
        return [(kind, each["model"], each | {"text": record["text"]}) for each in record.get("models", [record])]
    if isinstance(record, dict) and "results" in record and "recursion" in (record.get("config") or {}):
        record = [{"depth": "own", "results": record["results"], "recursion": record["config"]["recursion"]}]
    is_scores = isinstance(record, list) and all(isinstance(each, dict) and "results" in each for each in record)
    return [("scores", None, record)] if is_scores and record else []
