"""The folder beside the output in which preprocessing keeps its parts until all are complete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_recursive.data.spans import Span
from megatron_recursive.errors import UserError

KEPT_REASONS = 3


@dataclass
class PartReport:
    """How far a part is: documents, tokens, bytes on disk, malformed documents, and wall-clock seconds.

    ``finished`` is None until the part's files are complete.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)
    started: float = 0.0
    finished: float | None = None


@dataclass(frozen=True)
class WorkFolder:
    """Paths within ``PREFIX.partial``: the plan, the tokenizer, datatrove's logs, and a dataset per part."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def logs(self) -> Path:
        """Where datatrove notes completed parts, and keeps logs and statistics."""
        return self.path / "datatrove"

    @property
    def completions(self) -> Path:
        return self.logs / "completions"

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    def part(self, rank: int) -> Path:
        """Prefix of the dataset of a part; its .idx is written last."""
        return self.parts / f"{rank:05d}"

    def report(self, rank: int) -> PartReport | None:
        """The report of a part, or None if it was not begun."""
        try:
            return PartReport(**json.loads(self._report_file(rank).read_text("utf-8")))
        except FileNotFoundError:
            return None

    def write_report(self, rank: int, report: PartReport) -> None:
        write_replacing(self._report_file(rank), json.dumps(asdict(report)))

    def _report_file(self, rank: int) -> Path:
        return self.parts / f"{rank:05d}.json"

    def completed(self) -> list[int]:
        """Parts that are complete."""
        if not self.completions.is_dir():
            return []
        return sorted(int(file.name) for file in self.completions.iterdir() if file.name.isdigit())

    def forget(self, rank: int) -> None:
        """Take a part as not complete, so that the next run makes it again."""
        (self.completions / f"{rank:05d}").unlink(missing_ok=True)
        self._report_file(rank).unlink(missing_ok=True)

    def begin(self, key: dict[str, Any], parts: list[list[Span]]) -> bool:
        """Write the plan, and clear what belongs to another one; returns whether there was another."""
        known = self.key()
        differs = known is not None and known != key
        if known != key:
            for folder in (self.logs, self.parts):
                shutil.rmtree(folder, ignore_errors=True)
            self.parts.mkdir(parents=True)
            write_replacing(
                self.plan, json.dumps({"key": key, "parts": [[asdict(span) for span in part] for part in parts]})
            )
        self.parts.mkdir(exist_ok=True)
        return differs

    def key(self) -> dict[str, Any] | None:
        """What the parts depend on; None where no run has begun."""
        try:
            return json.loads(self.plan.read_text("utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def read_part(self, rank: int) -> list[Span]:
        """The spans of a part."""
        return [Span(**span) for span in json.loads(self.plan.read_text("utf-8"))["parts"][rank]]

    def count_parts(self) -> int:
        return len(json.loads(self.plan.read_text("utf-8"))["parts"])

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def locked(work: WorkFolder, output: str) -> Iterator[None]:
    """Make the folder and hold it for this process; the lock ends with the process, however that ends.

    Raises:
        UserError: another process holds it.
    """
    made = not work.path.exists()
    work.path.mkdir(parents=True, exist_ok=True)
    with open(work.path / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing --output {output}; wait for it or choose another") from error
        try:
            yield
        except BaseException:
            # Nothing is kept of a failed run that completed no part: there is nothing to go on from.
            if made and not work.completed():
                work.remove()
            raise


def write_replacing(file: Path, text: str) -> None:
    """Write a small file so that readers see the old text or the new one, never a half."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    os.replace(partial, file)
