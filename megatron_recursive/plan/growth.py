"""Growth: a model that becomes deeper in the course of its training (--grow-depth-at)."""

from __future__ import annotations

import dataclasses

from megatron_recursive.errors import UserError
from megatron_recursive.plan.recursion_config import RecursionConfig


@dataclasses.dataclass(frozen=True)
class Growth:
    """When a run of so many iterations grows, and how deep.

    Raises:
        UserError: it would train no iteration at its first depth.
    """

    config: RecursionConfig
    iterations: int

    def __post_init__(self) -> None:
        if self.at == 0:
            raise UserError(
                f"--grow-depth-at {self.config.grow_depth_at} of {self.iterations} iterations is their start, so that "
                "none would be trained before; start at the other depth, or train for longer."
            )

    @property
    def at(self) -> int | None:
        """The iterations that are trained at the first depth; None where all are."""
        growth = self.config.growth
        return None if growth is None else int(growth[0] * self.iterations)

    def config_after(self, trained: int) -> RecursionConfig:
        """The knobs of the model that has been trained for so many iterations: one that has grown says nothing of it."""
        growth = self.config.growth
        if growth is None or self.at is None or trained <= self.at:
            return self.config
        return dataclasses.replace(self.config, **{self.config.depth_knob: growth[1], "grow_depth_at": None, "grow_rewarm_iters": 0})

    def rate_factor(self, iteration: int) -> float:
        """Of the learning rate of a step, from 0: behind the growth it rises to the scheduled one again."""
        if self.at is None or iteration < self.at:
            return 1.0
        return min(1.0, (iteration - self.at + 1) / max(self.config.grow_rewarm_iters, 1))
