"""What a preparation did, as a table and as JSON: sizes, lengths, what was dropped and why, what was malformed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Malformed = dict[str, tuple[int, str]]
"""By kind of malformation: how many, and the first one's sentence, which names file and line."""

_KINDS = 200
_WORST = 8
_OTHERS = "something else"


@dataclass(frozen=True)
class Statistics:
    """Of a dataset: ``lengths`` are the tokens of a document (p50, p90, max), or without tokens its bytes of text.

    ``supervised_tokens`` are those that a loss counts (None: all). ``dropped`` are documents by the reason why they
    were left out or cut, ``malformed`` the most frequent malformations, each as ``what``, ``count`` and ``first``.
    """

    documents: int
    tokens: int | None
    lengths: dict[str, int]
    supervised_tokens: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    malformed: list[dict[str, Any]] = field(default_factory=list)
    bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def table(self) -> str:
        counts = (("documents", self.documents), ("tokens", self.tokens), ("bytes of text", self.bytes))
        rows = [(name, f"{count:,}") for name, count in counts if count is not None]
        if self.supervised_tokens is not None:
            share = self.supervised_tokens / max(self.tokens or 0, 1)
            rows.append(("supervised tokens", f"{self.supervised_tokens:,} ({share:.1%})"))
        rows += [(f"length {name}", f"{value:,}") for name, value in self.lengths.items()]
        rows += [(f"{count:,}", why) for why, count in self.dropped.items()]
        rows += [(f"{each['count']:,} malformed", f"{each['what']}; the first: {each['first']}")
                 for each in self.malformed]  # fmt: skip
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:>{width}}  {value}" for name, value in rows)


def lengths_of(pieces: Iterable[Any]) -> dict[str, int]:
    """p50, p90 and max of lengths that come as arrays; it holds one count for each length that occurs."""
    import numpy

    counts: Counter[int] = Counter()
    for piece in pieces:
        values, times = numpy.unique(piece, return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    if not counts:
        return {}
    lengths = numpy.array(sorted(counts))
    up_to = numpy.array([counts[length] for length in lengths.tolist()]).cumsum()
    shares = {"p50": 0.5, "p90": 0.9, "max": 1.0}
    return {name: int(lengths[numpy.searchsorted(up_to, share * up_to[-1])]) for name, share in shares.items()}


def note_malformed(noted: Malformed, sentence: str) -> None:
    """Count a malformed document by what is wrong with it: its sentence without place, numbers and particulars."""
    what = re.sub(r"^.*?(?::\d+|: row \d+) ", "", sentence, count=1)
    what = re.sub(r"\d+", "N", re.split(r" \(|;", what, maxsplit=1)[0])
    what = what if what in noted or len(noted) < _KINDS else _OTHERS
    count, first = noted.get(what, (0, sentence))
    noted[what] = (count + 1, first)


def add_malformed(several: Iterable[Mapping[str, Any]]) -> Malformed:
    """The counts of several parts together, the first being that of the first part that has it."""
    total: Malformed = {}
    for noted in several:
        for what, (count, first) in noted.items():
            before, earlier = total.get(what, (0, first))
            total[what] = (before + count, earlier)
    return total


def most_frequent(noted: Malformed) -> list[dict[str, Any]]:
    """As :class:`Statistics` has them."""
    worst = sorted(noted.items(), key=lambda item: -item[1][0])[:_WORST]
    return [{"what": what, "count": count, "first": first} for what, (count, first) in worst]
