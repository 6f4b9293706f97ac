"""What became of every tensor of a conversion: none is left unaccounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

REPORT_FILE = "conversion.json"  # of an import
STATUSES = ("copied", "merged", "split", "dropped", "new")


@dataclass
class Report:
    """One line a source tensor, and one a target tensor that has no source.

    Attributes:
        lines: name to (status, where it went, or why not).
        facts: what else the conversion's JSON says.
    """

    lines: dict[str, tuple[str, str]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    max_logit_error: float | None = None

    def add(self, status: str, name: str, note: str) -> None:
        assert status in STATUSES
        self.lines[name] = (status, note)

    def counts(self) -> dict[str, int]:
        counted = Counter(status for status, _ in self.lines.values())
        return {status: counted[status] for status in STATUSES}

    def summary(self) -> dict[str, Any]:
        """The last line of a command: what was merged or split was copied too, so that ``copied`` counts it."""
        counts = self.counts()
        copied = counts["copied"] + counts["merged"] + counts["split"]
        return {"max_logit_error": self.max_logit_error, **counts, "copied": copied, **self.facts}

    def to_json(self) -> str:
        tensors = [{"tensor": k, "status": status, "note": note} for k, (status, note) in sorted(self.lines.items())]
        return json.dumps({"summary": self.summary(), "tensors": tensors}, indent=1) + "\n"

    def describe(self, file: str = "") -> str:
        """The counts of :meth:`summary`, and dropped and new tensors by name: a few, and where all are."""
        counts, total = self.counts(), self.summary()["copied"]
        parts = ", ".join(f"{counts[status]} of them {status}" for status in ("merged", "split") if counts[status])
        said = [f"{total} copied{f' ({parts})' if parts else ''}"] if total else []
        said += [f"{counts[status]} {status}" for status in ("dropped", "new") if counts[status]]
        lines = [", ".join(said) or "no tensors"]
        for status in ("dropped", "new"):
            named = [(name, note) for name, (found, note) in self.lines.items() if found == status]
            lines += few(status, [f"{name} ({note})" for name, note in named], file)
        return "\n".join(lines)


def few(status: str, names: Sequence[str], file: str = "") -> list[str]:
    """A line each, and one that counts the rest of many."""
    lines = [f"  {status}: {name}" for name in names[:6]]
    if len(names) > 6:
        lines.append(f"  {status}: {len(names) - 6} more{f', listed in {file}' if file else ''}")
    return lines
