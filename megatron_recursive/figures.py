"""How all commands say a figure, and the names under which metrics.jsonl has those of each block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

NOTHING = 0.002  # nats: a difference of losses that says nothing


def blocks_of(metrics: Mapping[str, float], name: str = "lm loss", of: str = "block") -> dict[int, float]:
    """``"lm loss block 3"`` and its like, by block; ``of`` depth, by depth."""
    prefix = f"{name} {of} "
    names = {int(at): key for key in metrics if key.startswith(prefix) and (at := key.removeprefix(prefix)).isdigit()}
    return {block: metrics[names[block]] for block in sorted(names)}


def perplexity(loss: float) -> float:
    """Of a loss in nats per token."""
    return math.exp(min(loss, 700.0))  # the largest that a float holds is e^709


def count(number: float | None) -> str:
    """A number of tokens in five characters or fewer: 950, 1.2k, 307k, 6.5M, 1.3B, 2.0T; - where it is not known."""
    if number is None:
        return "-"
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor * 0.9995:
            scaled = number / factor
            return f"{scaled:.0f}{unit}" if scaled >= 99.95 else f"{scaled:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float | None) -> str:
    """Two units: 43s, 2m05s, 3h10m, 12d04h; - where it is not known."""
    if seconds is None:
        return "-"
    whole = max(round(seconds), 0)
    for size, unit, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{smaller}"
    return f"{whole}s"


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a table, whose first columns are flush left."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    sides = ("<" * left).ljust(len(heads), ">")
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
            for row in (heads, *rows)]  # fmt: skip
