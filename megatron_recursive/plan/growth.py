"""Growth: a model that becomes deeper in the course of its training (--grow-depth-at).

``config`` is a RecursionConfig, whose module imports this one.
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of

FORM = re.compile(r"(0?\.\d*[1-9]\d*):([1-9]\d*)")
BESIDE = ("recurrence_distribution", "recurrence_curriculum", "backprop_curriculum")  # what else sets a step's depth


def check_growth(config: Any) -> None:
    """Refuse a growth that is none, or that another knob contradicts."""
    given, rewarm = f"--grow-depth-at {config.grow_depth_at}", config.grow_rewarm_iters
    if config.grow_depth_at is None and rewarm:
        raise UserError(f"--grow-rewarm-iters {rewarm} says nothing without --grow-depth-at; leave it out.")
    if rewarm < 0:
        raise UserError(f"--grow-rewarm-iters must be 0 or more, but is {rewarm}.")
    if config.grow_depth_at is None:
        return
    if FORM.fullmatch(config.grow_depth_at) is None:
        raise UserError(f"{given} must be FRACTION:K, a fraction between 0 and 1 and a whole number, such as 0.77:4.")
    if not config.enable_recursive_refinement:
        raise UserError(f"{given} needs a depth to grow; leave it or --disable-recursive-refinement out.")
    depth, knob = getattr(config, config.depth_knob), flag_of(config.depth_knob)
    if depth >= _growth(config)[1]:
        raise UserError(f"{given} does not deepen a model of {knob} {depth}; name a larger K, or a smaller {knob}.")
    for name in BESIDE:
        if getattr(config, name) not in (None, "fixed"):
            raise UserError(f"{given} and {flag_of(name)} both set the depth of steps; leave one of them out.")


def _growth(config: Any) -> tuple[Fraction, int]:
    fraction, depth = str(config.grow_depth_at).split(":")
    return Fraction(fraction), int(depth)  # as it is written: the float 0.29 * 100 is below 29


class Growth:
    """The growth of a run of so many iterations, perhaps none.

    Attributes:
        at: how many iterations are trained at the first depth; None: all.
        depth: how deep the model is behind them.

    Raises:
        UserError: it would train none at its first depth.
    """

    def __init__(self, config: Any, iterations: int) -> None:
        self.config, self.at, self.depth = config, None, getattr(config, config.depth_knob)
        if config.grow_depth_at is None:
            return
        fraction, self.depth = _growth(config)
        self.at = int(fraction * iterations)
        if not self.at:
            raise UserError(
                f"--grow-depth-at {config.grow_depth_at} of {iterations} iterations is their start, so that none has "
                f"{flag_of(config.depth_knob)} {getattr(config, config.depth_knob)}; train for more."
            )

    def config_after(self, trained: int) -> Any:
        """The knobs of the model that has been trained for so many iterations; one that has grown grows no more."""
        if self.at is None or trained <= self.at:
            return self.config
        knobs = {self.config.depth_knob: self.depth, "grow_depth_at": None, "grow_rewarm_iters": 0}
        return dataclasses.replace(self.config, **knobs)

    def rate_factor(self, iteration: int) -> float:
        """Of the learning rate of a step, from 0."""
        if self.at is None or iteration < self.at:
            return 1.0
        return min(1.0, (iteration - self.at + 1) / max(self.config.grow_rewarm_iters, 1))
