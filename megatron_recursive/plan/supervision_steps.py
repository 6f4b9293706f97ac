"""Supervision steps: several optimizer steps on carried states (--num-supervision-steps).

``config`` is a RecursionConfig, whose module imports this one.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.recursion_plan import RecursionPlan


def check_carried(config: Any) -> None:
    """Refuse steps that are none, and halting samples without states to carry or a head that halts."""
    if config.num_supervision_steps < 1:
        raise UserError(f"--num-supervision-steps must be at least 1, but is {config.num_supervision_steps}.")
    if not 0 <= config.halt_exploration <= 1:
        raise UserError(f"--halt-exploration must lie between 0 and 1, but is {config.halt_exploration}.")
    if config.carry_halted and config.num_supervision_steps < 2:
        raise UserError(
            "--carry-halted replaces samples between supervision steps; give --num-supervision-steps 2 or more."
        )
    if config.carry_halted and config.halt_loss_weight == 0:
        raise UserError("--carry-halted asks the halting head, which --halt-loss-weight 0 leaves out.")
    if not config.carry_halted and config.halt_exploration != _default(config, "halt_exploration"):
        raise UserError(
            f"--halt-exploration {config.halt_exploration} says nothing without --carry-halted; leave it out."
        )


@lru_cache(maxsize=8)
def in_a_row(plan: RecursionPlan, steps: int) -> RecursionPlan:
    """So many supervision steps of a batch as one plan, by which a model is served that was trained with them."""
    return plan if steps == 1 else plan.with_blocks(plan.depth * steps)


def whole(config: Any) -> Any:
    """The knobs of which a trained model's supervision steps are one plan, as :func:`in_a_row` makes it."""
    if config.num_supervision_steps == 1:
        return config
    steps = ("num_supervision_steps", "carry_halted", "halt_exploration", "grow_depth_at", "grow_rewarm_iters")
    depth = {config.depth_knob: config.num_supervision_steps * getattr(config, config.depth_knob)}
    return dataclasses.replace(config, **{name: _default(config, name) for name in steps}, **depth)


def _default(config: Any, name: str) -> Any:
    return type(config).__dataclass_fields__[name].default
