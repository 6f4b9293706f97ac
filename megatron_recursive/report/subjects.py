"""What there is to tell of a run or a model: its metrics, and what other commands have left in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_recursive.data.tokenizer import is_hub_name
from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plots.event_files import find_events
from megatron_recursive.plots.records import VERSIONS, kind_of
from megatron_recursive.plots.run_summary import summarize_runs
from megatron_recursive.plots.runs import FILE, SUBFOLDER, read_runs

WEIGHTS = ("latest_checkpointed_iteration.txt", "metadata.json", "config.json")  # one of them lies beside weights


@dataclass
class Subject:
    """A run, a model, or both.

    Attributes:
        model: its weights, as commands take them; None where there are none.
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

    @property
    def is_plain(self) -> bool:
        return self.plan is not None and self.plan.is_plain

    def collect(self) -> None:
        """Read the records in its folder and in ``runs``; of a kind the newest counts, if it is as new as the weights.

        One names these weights; one in its folder may name none, or some that are gone. A UserError names what cannot
        be read.
        """
        marks = [Path(self.model) / name for name in WEIGHTS] if self.model else []
        trained = max((mark.stat().st_mtime for mark in marks if mark.is_file()), default=0.0)
        files = [file for kind in VERSIONS if (file := Path(f"runs/{kind}.json")).is_file()]  # where they write unasked
        files += [file for end in ("json", "jsonl") for file in self.folder.glob(f"*.{end}") if file.name != FILE]
        files += [file for kind in ("results", "depths") for file in self.folder.rglob(f"{kind}_*.json")]
        home = self.folder.resolve()
        own = {_weights(path) for path in (home, home / SUBFOLDER, *([Path(self.model)] if self.model else []))}
        for file in sorted(files, key=lambda file: file.stat().st_mtime):
            for kind, model, record in _records(file) if file.stat().st_mtime >= trained else ():
                named = model is not None and (Path(model).exists() or is_hub_name(model))
                if _weights(Path(str(model))) in own if named else file.resolve().is_relative_to(home):
                    self.found[kind] = record


def find_subjects(given: Sequence[str]) -> tuple[list[Subject], list[str]]:
    """Runs, as ``summarize`` takes them, and models; and what is said of the runs side by side.

    Raises:
        UserError: one is neither run nor model, or a file is malformed.
    """
    subjects, runs = [], dict[str, Subject]()
    for each in given:
        path = Path(each)
        folder = path if path.is_dir() else path.parent
        folder = folder.parent if folder.name == SUBFOLDER else folder
        places = [path] if path.suffix == ".gguf" else [folder / SUBFOLDER, path]
        held = (str(at) for at in places for name in ("", *WEIGHTS) if (at / name).is_file())
        subjects.append(Subject(each, folder, folder.resolve().name, next(held, None)))
        metrics = (path, path / FILE, path / SUBFOLDER / FILE)
        if any(file.is_file() for file in metrics) and path.suffix != ".gguf" or find_events(path) is not None:
            runs[each] = subjects[-1]
        elif subjects[-1].model is None:
            raise UserError(f"{each} is neither a run nor a model; name a --save folder, or a Hugging Face folder.")
    summary: dict[str, Any] = summarize_runs([*runs])[1] if runs else {"runs": [], "comparisons": []}
    for subject, run, figures in zip(runs.values(), read_runs([*runs]), summary["runs"], strict=True):
        subject.name, subject.plan, subject.figures = run.name, run.plan, figures
    for subject in subjects:
        subject.collect()
    return subjects, [each["said"] for each in summary["comparisons"]]


def _weights(path: Path) -> Path:
    """What lies there: of a checkpoint, the iteration that is read."""
    tracker = path / WEIGHTS[0]
    said = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    return (path / (f"iter_{int(said):07d}" if said.isdecimal() else said)).resolve()


def _records(file: Path) -> list[tuple[str, str | None, Any]]:
    """(kind, model, record) of each that a file holds."""
    try:
        if file.suffix == ".jsonl":  # which may be a corpus
            with file.open(encoding="utf-8", errors="replace") as lines:
                first = lines.readline()
                return [("samples", None, [*map(json.loads, (first, *lines))])] if '"blocks"' in first else []
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} as JSON ({error}); write it again, or remove it.") from error
    kind = kind_of(record)
    if kind is not None:
        return [(kind, each["model"], each | {"text": record["text"]}) for each in record.get("models", [record])]
    model = None
    if isinstance(record, dict) and "results" in record and isinstance(record.get("config"), dict):  # of lm-eval
        given = record["config"].get("model_args")
        model = given.get("pretrained") if isinstance(given, dict) else None
        record = [{"depth": "own", "results": record["results"]}]
    is_scores = isinstance(record, list) and all(isinstance(each, dict) and "results" in each for each in record)
    return [("scores", model, record)] if is_scores and record else []
