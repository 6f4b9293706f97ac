"""How deep training steps go: the probability of each depth, from 1, and curricula."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from itertools import accumulate
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of

CURRICULA = ("recurrence_curriculum", "backprop_curriculum")
SIGMA = 0.5  # of the logarithm of a step's rate (Geiping et al. 2025, Huginn)
NODES = tuple(node / 4 for node in range(-28, 29))  # of a normal, whose density makes the trapezoidal rule exact


@lru_cache(maxsize=128)
def poisson_lognormal(mean: float, cap: int, *, calibrated: bool = True) -> tuple[float, ...]:
    """Of ``min(cap, 1 + Poisson(rate))``, the rate log-normal: Huginn's distribution of the depth of a training step.

    Calibrated, the location of the rate is solved so that the depth has the asked mean, below the cap. Otherwise it is
    the paper's: the mean of the rate is the asked one, so that the depth's is one more, less what the cap takes.
    """
    if not calibrated:
        return _mixture(math.log(mean) - SIGMA**2 / 2, cap)
    if mean <= 1:
        return (1.0,)
    low, high = math.log(mean - 1) - SIGMA**2 / 2, math.log(cap) + 10  # what it were without a cap, and far too much
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of(_mixture(middle, cap)) < mean else (low, middle)
    return _mixture(low, cap)


def _mixture(location: float, cap: int) -> tuple[float, ...]:
    weights = [math.exp(-node * node / 2) for node in NODES]
    found = [0.0] * (cap - 1)
    for node, weight in zip(NODES, weights, strict=True):
        rate = math.exp(location + SIGMA * node)
        chance = weight / sum(weights) * math.exp(-rate)
        for extra in range(cap - 1):
            found[extra] += chance
            chance *= rate / (extra + 1)
    return (*found, max(0.0, 1.0 - sum(found)))


def uniform(mean: float, cap: int) -> tuple[float, ...]:
    """Of the whole numbers from ``2 mean - cap`` to the cap."""
    least = round(2 * mean) - cap
    return (*(0.0,) * (least - 1), *(1.0 / (cap - least + 1),) * (cap - least + 1))


def mean_of(probabilities: tuple[float, ...]) -> float:
    return sum(depth * chance for depth, chance in enumerate(probabilities, start=1))


def depth_at(probabilities: tuple[float, ...], place: float) -> int:
    """The depth at a place in [0, 1) of the cumulative distribution."""
    return next((depth for depth, sum_ in enumerate(accumulate(probabilities), 1) if place < sum_), len(probabilities))


def grown(value: float, shape: str, part: float) -> float:
    """What a curriculum has come to after a part of its length: whole numbers from 1 up to a value."""
    reached = min(part, 1.0) if shape == "linear" else 1.0 - math.sqrt(1.0 - min(part, 1.0))
    return min(value, max(1, math.ceil(value * reached - 1e-9)))  # 25 * 0.28 is a float above 7


def check_depths(config: Any) -> None:
    """Refuse knobs of a RecursionConfig (whose module imports this one) out of range, and those that say nothing."""
    for name in ("mean_recurrence", "max_recurrence"):
        value = getattr(config, name)
        if value is not None and not 1 <= value < math.inf:
            raise UserError(f"{flag_of(name)} must be a number of at least 1, but is {value}.")
    for name in CURRICULA:
        fraction = getattr(config, f"{name}_fraction")
        if not 0 < fraction <= 1:
            raise UserError(
                f"{flag_of(name)}-fraction must be above 0 and at most 1, the whole training, but is {fraction}."
            )
    drawn, needs = "--recurrence-distribution poisson-lognormal", {}
    if config.recurrence_distribution == "fixed":
        needs = dict.fromkeys(("mean_recurrence", "max_recurrence"), f"{drawn} or uniform")
    if config.recurrence_distribution != "poisson-lognormal":
        needs["uncalibrated_recurrence"] = drawn
    if not config.backprop_depth:
        needs["backprop_curriculum"] = "--backprop-depth"
    needs |= {f"{name}_fraction": flag_of(name) for name in CURRICULA if getattr(config, name) is None}
    for knob in (knob for knob in dataclasses.fields(config) if knob.name in needs):
        if getattr(config, knob.name) != knob.default:
            raise UserError(f"{flag_of(knob.name)} says nothing without {needs[knob.name]}; leave it out.")
