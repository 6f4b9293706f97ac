"""What the knobs of a step's depth refuse.

``config`` is a RecursionConfig, whose module imports this one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from megatron_recursive.errors import UserError

CURRICULA = ("recurrence_curriculum", "backprop_curriculum")


def check_depths(config: Any) -> None:
    """Refuse values out of range, and knobs that say nothing beside the others."""
    for name in ("mean_recurrence", "max_recurrence"):
        value = getattr(config, name)
        if value is not None and not 1 <= value < math.inf:
            raise UserError(f"{_flag(name)} must be a number of at least 1, but is {value}.")
    for name in CURRICULA:
        fraction = getattr(config, f"{name}_fraction")
        if not 0 < fraction <= 1:
            raise UserError(
                f"{_flag(name)}-fraction must be above 0 and at most 1, the whole training, but is {fraction}."
            )
    drawn, needs = "--recurrence-distribution poisson-lognormal", {}
    if config.recurrence_distribution == "fixed":
        needs = dict.fromkeys(("mean_recurrence", "max_recurrence"), f"{drawn} or uniform")
    if config.recurrence_distribution != "poisson-lognormal":
        needs["uncalibrated_recurrence"] = drawn
    if not config.backprop_depth:
        needs["backprop_curriculum"] = "--backprop-depth"
    needs |= {f"{name}_fraction": _flag(name) for name in CURRICULA if getattr(config, name) is None}
    for knob in (knob for knob in dataclasses.fields(config) if knob.name in needs):
        if getattr(config, knob.name) != knob.default:
            raise UserError(f"{_flag(knob.name)} says nothing without {needs[knob.name]}; leave it out.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
