"""The folder beside the output in which preprocessing keeps its parts until all are complete."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_recursive.data.spans import Span
from megatron_recursive.data.statistics import note_malformed
from megatron_recursive.errors import UserError

LOCK = "lock"  # of a folder that one process holds


@dataclass
class PartReport:
    """How far a part is: documents, tokens, bytes on disk, malformed documents, and wall-clock seconds.

    ``finished`` is None until the part's files are complete. ``supervised`` counts tokens, ``dropped`` documents by the
    reason, ``malformed`` as :data:`megatron_recursive.data.statistics.Malformed` does.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    skipped: int = 0
    started: float = 0.0
    finished: float | None = None
    supervised: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    malformed: dict[str, tuple[int, str]] = field(default_factory=dict)
    peak_bytes: int = 0

    def drop(self, why: str) -> None:
        """Count what was left out or cut."""
        self.dropped[why] = self.dropped.get(why, 0) + 1

    def reject(self, error: UserError, on_error: str) -> None:
        """Count a malformed document, or with ``on_error`` ``stop`` raise the error."""
        if on_error == "stop":
            raise error
        self.skipped += 1
        note_malformed(self.malformed, str(error))


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

    @property
    def counts(self) -> Path:
        """What the parts of this run have read so far."""
        return self.path / "counts"

    @property
    def inserted(self) -> Path:
        """Where the steps of ``--pipeline`` may keep files."""
        return self.path / "pipeline"

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

    def begin(self, key: dict[str, Any], plan: Callable[[], list[list[Span]]]) -> bool:
        """Write the plan if the folder has another one or none; returns whether there was another.

        What belongs to another one is cleared. That of the same key is kept: to plan anew would read many footers.
        """
        known = self.key()
        self.counts.unlink(missing_ok=True)
        if known != key:
            parts = plan()
            # Beside the parts' logs lie those of a cluster's last task, which would be taken for done.
            for folder in (*self.path.glob(f"{self.logs.name}*"), self.parts, self.inserted):
                shutil.rmtree(folder, ignore_errors=True)
            self.parts.mkdir(parents=True)
            write_replacing(
                self.plan, json.dumps({"key": key, "parts": [[asdict(span) for span in part] for part in parts]})
            )
        self.parts.mkdir(exist_ok=True)
        return known is not None and known != key

    def key(self) -> dict[str, Any] | None:
        """What the parts depend on; None where no run has begun."""
        try:
            return self._read_plan()["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def read_part(self, rank: int) -> list[Span]:
        """The spans of a part."""
        return [Span(**span) for span in self._read_plan()["parts"][rank]]

    def count_parts(self) -> int:
        return len(self._read_plan()["parts"])

    def part_sizes(self) -> list[int]:
        """Bytes on disk that each part is made of."""
        return [sum(span["size"] for span in part) for part in self._read_plan()["parts"]]

    def _read_plan(self) -> dict[str, Any]:
        return _parse_plan(self.plan, self.plan.stat().st_mtime_ns)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@functools.lru_cache(maxsize=1)
def _parse_plan(plan: Path, modified: int) -> dict[str, Any]:
    """It can name 100,000 files, and each part of it asks."""
    return json.loads(plan.read_text("utf-8"))


@contextmanager
def holding(folder: Path, flag: str) -> Iterator[None]:
    """Make a folder and hold it for this process; the lock ends with the process, however that ends. Where nothing was
    written into it, a failed run leaves none.

    Raises:
        UserError: another process holds it, or it cannot be made; ``flag`` is what the user calls it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")
    except OSError as error:
        raise UserError(f"cannot write {flag} ({error.strerror}); choose another or mend that one") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing {flag}; wait for it or choose another") from error
        except OSError:
            pass  # a disk without locks
        try:
            yield
        except BaseException:
            if [file.name for file in folder.glob("*")] == [LOCK]:
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def locked(work: WorkFolder, output: str) -> Iterator[None]:
    """As :func:`holding`; a failed run that completed no part leaves nothing."""
    made = not work.path.exists()
    with holding(work.path, f"--output {output}"):
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
