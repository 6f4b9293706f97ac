"""From scores to stacks: a prelude and a coda that change the stream much, a core that changes it little."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from megatron_recursive.errors import UserError


def find_stacks(distance: Sequence[float], influence: Sequence[float], target: int | None = None) -> dict[str, Any]:
    """Layers from 0 of ``prelude``, ``core`` and ``coda``, and which of the middle are ``left_out``.

    Prelude and coda lie outside the knees of the distance on both sides of its lowest layer (Encode-Think-Decode, arXiv
    2510.07358); ``boundaries`` says where no knee was found and a third of the layers was taken. With a target the core
    keeps its most influential layers.

    Raises:
        UserError: the middle has fewer layers than the target.
    """
    total, lowest = len(distance), min(range(len(distance)), key=distance.__getitem__)
    sides = {"prelude": list(distance[: lowest + 1]), "coda": list(distance[lowest:])[::-1]}
    knees = {name: _knee(side) for name, side in sides.items()}
    sizes = {name: min(total // 3, len(sides[name]) - 1) if knee is None else knee for name, knee in knees.items()}
    middle = list(range(sizes["prelude"], total - sizes["coda"]))
    if target is not None and not 1 <= target <= len(middle):
        raise UserError(
            f"--target-recurrent-size {target} must lie between 1 and {len(middle)}, the number of layers between "
            f"prelude and coda ({middle[0]} to {middle[-1]})."
        )
    core = sorted(sorted(middle, key=lambda layer: -influence[layer])[:target])
    return {
        "prelude": list(range(middle[0])), "core": core, "coda": list(range(middle[-1] + 1, total)),
        "left_out": [layer for layer in middle if layer not in core],
        "boundaries": {name: "third" if knee is None else "kneedle" for name, knee in knees.items()},
    }  # fmt: skip


def _knee(falling: list[float]) -> int | None:
    """Where a curve that ends in its lowest point becomes flat (Kneedle, Satopaa et al. 2011)."""
    if len(falling) < 3:  # nothing falls, or one layer alone is higher
        return len(falling) - 1
    from kneed import KneeLocator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where there is no knee
        knee = KneeLocator(range(len(falling)), falling, curve="convex", direction="decreasing").knee
    return None if knee is None else int(knee)
