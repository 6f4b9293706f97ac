"""Layers for the first and the last stage, where a plan runs some layers more often than others."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from megatron_recursive.accounting import ModelShape
from megatron_recursive.pipeline.pass_costs import price_passes
from megatron_recursive.plan import RecursionPlan

WORTH_SAYING = 0.95  # of the fullest stage's work


@functools.lru_cache(maxsize=64)
def balanced_split(plan: RecursionPlan, shape: ModelShape, stages: int, backward_cost: float = 2.0) -> tuple[int, ...]:
    """The layers of each stage: equal ones, or, of several stacks, those whose fullest stage works least.

    Stages between the first and the last are alike, as Megatron's flags have them. Of equally good splits the most
    equal one.
    """
    layers = shape.num_layers
    equal = (layers // stages,) * stages
    if stages == 1 or (len(plan.stacks) == 1 and layers % stages == 0):
        return equal
    work = [0.0, *accumulate(price_passes(plan, shape, (1,) * layers, backward_cost).busy(1))]

    def fullest(split: tuple[int, ...]) -> tuple[float, int]:
        most = max(work[end] - work[start] for start, end in pairwise(accumulate(split, initial=0)))
        return round(most, 9), max(split) - min(split)

    return min(_splits(layers, stages), key=fullest, default=equal)


def _splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for first in range(1, layers):
        for last in range(1, layers - first + 1):
            rest = layers - first - last
            if stages == 2 and not rest:
                yield first, last
            elif stages > 2 and rest >= stages - 2 and rest % (stages - 2) == 0:
                yield first, *(rest // (stages - 2),) * (stages - 2), last


def split_flags(split: Sequence[int]) -> list[str]:
    """Megatron's flags for a split; none for equal stages."""
    if len(set(split)) < 2:
        return []
    flags = [f"--decoder-first-pipeline-num-layers={split[0]}", f"--decoder-last-pipeline-num-layers={split[-1]}"]
    return flags[: len(split) - 1]  # of two stages the last has the rest


def said_of_balance(plan: RecursionPlan, shape: ModelShape, split: Sequence[int]) -> str:
    """Which flags would balance the stages of a run; nothing where little is to be had."""
    better = balanced_split(plan, shape, len(split))
    now, then = (max(price_passes(plan, shape, layers).busy(1)) for layers in (split, better))
    if then > WORTH_SAYING * now:
        return ""
    flags = " ".join(split_flags(better)) or "equal stages"
    return f"stages of {', '.join(map(str, split))} layers: with {flags} the fullest works {1 - then / now:.0%} less"
