"""The plan of each training step: a pure function of the knobs, the seed and the iteration.

So all ranks agree without a message, and a resumed run draws the same. Evaluation runs the model's own plan.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from functools import lru_cache

from megatron_recursive.errors import UserError
from megatron_recursive.plan.builders import build_plan
from megatron_recursive.plan.deep_supervision import share_of, supervised
from megatron_recursive.plan.depth_distributions import depth_at, grown, mean_of, poisson_lognormal, uniform
from megatron_recursive.plan.growth import Growth
from megatron_recursive.plan.recursion_config import RecursionConfig
from megatron_recursive.plan.recursion_plan import RecursionPlan
from megatron_recursive.plan.supervision_steps import in_a_row

DEEPEST = 600  # that is drawn: of a rate above 700 a float holds no probability of 0
STEPS = 2_000  # of a run that is not known, of which the mean is counted


class StepPlans:
    """Plans of a run's training steps.

    Args:
        config: the knobs.
        plan: the model's own; of one that grows, before it does.
        seed: of the run; None spreads the draws evenly, for a count of what is to be expected.
        iterations: of the whole run, of which curricula take a fraction; None: not known, and ramps are over.

    Raises:
        UserError: the knobs contradict each other.
    """

    def __init__(
        self, config: RecursionConfig, plan: RecursionPlan, *, seed: int | None = 0, iterations: int | None = None
    ) -> None:
        self.config, self.plan, self.seed, self.iterations = config, plan, seed, iterations or STEPS
        self.growth = Growth(config, self.iterations)
        depth = plan.depth if self.growth.at is None else self.growth.depth
        self.mean = float(depth if config.mean_recurrence is None else config.mean_recurrence)
        has_ramp = iterations is not None and not (plan.is_plain or plan.trains_heads_only)
        self.ramp = config.deep_supervision_warmup if has_ramp else None
        self._plan_of = lru_cache(maxsize=256)(self._plan)  # whose hash is quick, unlike a plan's
        self._grown = lru_cache(maxsize=1)(build_plan)
        self._check()

    @property
    def changes(self) -> bool:
        """Whether any step may run another plan than the model's own."""
        return self._depth_changes or self.ramp is not None

    @property
    def _depth_changes(self) -> bool:
        knobs = self.config
        curricula = (knobs.recurrence_curriculum, knobs.backprop_curriculum)
        return not self.plan.is_plain and (
            knobs.recurrence_distribution != "fixed" or any(curricula) or knobs.grow_depth_at is not None
        )

    def own_plan(self, trained: int) -> RecursionPlan:
        """The plan of the model that has been trained for so many iterations: of one of its supervision steps."""
        config = self.growth.config_after(trained)
        if config is self.config:
            return self.plan
        plan = self._grown(config)
        return plan.heads_only() if self.plan.trains_heads_only else plan

    def served_plan(self, trained: int | None = None) -> RecursionPlan:
        """As :meth:`own_plan` (None: of the whole run), the supervision steps of a batch in a row: what evaluations and
        exports run.
        """
        plan = self.own_plan(self.iterations if trained is None else trained)
        return in_a_row(plan, self.config.num_supervision_steps)

    def plan_at(self, iteration: int) -> RecursionPlan:
        """The plan of a training step, counted from 0 (as Megatron's ``curr_iteration``)."""
        return self._plan_of(*self._traits(iteration))

    @property
    def deepest(self) -> RecursionPlan:
        """The plan of the deepest step that there may be."""
        return with_depth(self.own_plan(self.iterations), self.cap, self.config.backprop_depth)

    def counts(self, most: int = 10_000) -> Counter[RecursionPlan]:
        """How often each plan is run: in all steps of a run, or in so many that lie evenly in it."""
        if not self.changes:
            return Counter({self.plan: 1})
        steps = map(self._traits, range(0, self.iterations, -(-self.iterations // most)))
        traits, found = Counter((*others, float(share > 0)) for *others, share in steps), Counter[RecursionPlan]()
        for each, number in traits.items():  # whatever the share is, a step costs the same
            found[self._plan_of(*each)] += number
        return found

    def drawn(self) -> list[tuple[float, RecursionPlan]]:
        """The plans of steps behind all curricula, with their probabilities."""
        if self.plan.is_plain:
            return [(1.0, self.plan)]
        chances = enumerate(self._distribution(self.mean), start=1)
        return [(chance, with_depth(self.plan, depth, self.config.backprop_depth)) for depth, chance in chances]

    def depth_at(self, iteration: int) -> int:
        """How deep a step goes: blocks, loops, or passes of a recurrent core."""
        chances = self._distribution(self._mean_at(iteration))
        place = iteration * (math.sqrt(5) - 1) / 2 % 1
        if self.seed is not None:
            place = random.Random(self.seed * 0x9E3779B97F4A7C15 + iteration).random()
        return depth_at(chances, place)

    @property
    def cap(self) -> int:
        """The deepest that a step may go."""
        if self.config.recurrence_distribution == "fixed":
            return round(self.mean)
        if self.config.max_recurrence is not None:
            return self.config.max_recurrence
        return round(2 * self.mean - 1) if self.config.recurrence_distribution == "uniform" else round(4 * self.mean)

    def expected_depth(self, iteration: int | None = None) -> float:
        """The mean depth of a step; without an iteration, behind curriculum and growth."""
        return mean_of(self._distribution(self.mean if iteration is None else self._mean_at(iteration)))

    def describe(self) -> str:
        """A line for people; nothing where all steps run the model's own plan."""
        ramp = []
        if self.ramp is not None:
            ramp = ["blocks before the last are supervised from iteration {} on, in full from {}".format(*self.ramp)]
        if not self._depth_changes:
            return "".join(ramp)
        if self.growth.at is not None:
            times = f"{self.config.num_supervision_steps} times " * (self.config.num_supervision_steps > 1)
            grows = (f"depth of a training step: {self.plan.depth}, behind iteration {self.growth.at} "
                     f"{self.growth.depth}; evaluated and exported at {times}that of its last step")  # fmt: skip
            return " | ".join([grows, *ramp])
        config, mean, cap = self.config, f"mean {self.expected_depth():.4g}", self.cap
        said = {"fixed": f"{self.mean:g}", "uniform": f"uniform, {mean}, at most {cap}",
                "poisson-lognormal": f"min({cap}, 1 + Poisson of a log-normal rate), {mean}"}  # fmt: skip
        parts = [f"depth of a training step: {said[config.recurrence_distribution]}"]
        for what, shape, fraction in (("depth", config.recurrence_curriculum, config.recurrence_curriculum_fraction),
                                      ("gradient", config.backprop_curriculum, config.backprop_curriculum_fraction)):
            parts += [f"{what} grows over {fraction:.0%} of the training ({shape})"] if shape else []
        return " | ".join([*parts, f"evaluated and exported at {self.served_plan().depth}", *ramp])

    def _mean_at(self, iteration: int) -> float:
        if self.growth.at is not None:
            return float(self.plan.depth if iteration < self.growth.at else self.growth.depth)
        shape, length = self.config.recurrence_curriculum, self.config.recurrence_curriculum_fraction * self.iterations
        return self.mean if shape is None else grown(self.mean, shape, iteration / length)

    def _distribution(self, mean: float) -> tuple[float, ...]:
        kind = self.config.recurrence_distribution
        if kind == "uniform":
            return uniform(mean, min(self.cap, round(2 * mean - 1)))
        if kind == "poisson-lognormal":
            return poisson_lognormal(mean, self.cap, calibrated=not self.config.uncalibrated_recurrence)
        return uniform(mean, round(mean))

    def _traits(self, iteration: int) -> tuple[bool, int, int, float]:
        """What tells the plan of a step: has the model grown, depth, window of gradient, share of deep supervision."""
        window, shape = self.config.backprop_depth, self.config.backprop_curriculum
        if shape is not None:
            length = self.config.backprop_curriculum_fraction * self.iterations
            window = round(grown(window, shape, iteration / length))
        has_grown = self.growth.at is not None and iteration >= self.growth.at
        share = 1.0 if self.ramp is None else share_of(self.ramp, iteration)
        return has_grown, self.depth_at(iteration) if self._depth_changes else 0, window, share

    def _plan(self, has_grown: bool, depth: int, window: int, share: float) -> RecursionPlan:
        plan = self.own_plan(self.iterations if has_grown else 0)
        if self.changes:
            plan = supervised(with_depth(plan, depth or plan.depth, window), self.config, share)
        return self.plan if plan == self.plan else plan

    def _check(self) -> None:
        config, cap, kind = self.config, self.cap, self.config.recurrence_distribution
        self.own_plan(self.iterations)  # refuses what it would become
        if config.backprop_depth > cap and not self.plan.is_plain:
            raise UserError(f"--backprop-depth {config.backprop_depth} is above {cap}, the deepest that a step goes.")
        if self.ramp is not None and self.ramp[1] > self.iterations:
            raise UserError(
                f"--deep-supervision-warmup {self.ramp[0]} {self.ramp[1]} ends behind the {self.iterations} iterations "
                "of the training; give an END of at most so many."
            )
        if not self._depth_changes:
            return
        if kind != "fixed" and cap > DEEPEST:
            raise UserError(f"--recurrence-distribution {kind} would draw depths of up to {cap}; give --max-recurrence "
                            f"{DEEPEST} or less.")  # fmt: skip
        if config.backprop_depth and self.growth.at is None:  # a step that starves weights is refused before the first
            with_depth(self.plan, cap, 1 if config.backprop_curriculum else config.backprop_depth)
        if self.plan.depth == 1 and cap > 1 and self.growth.at is None:
            raise UserError(
                f"--recurrence-distribution {kind} changes a depth of 1, which shows no inner block to repeat; give "
                "--num-recurrences or --num-refinement-blocks 2 or more."
            )
        mean = f"{self.mean:g}"
        if kind == "poisson-lognormal" and self.mean >= cap and not config.uncalibrated_recurrence:
            raise UserError(f"--mean-recurrence {mean} must be below the cap of {cap} (--max-recurrence).")
        if kind == "uniform" and not (1 <= 2 * self.mean - cap <= cap and (2 * self.mean).is_integer()):
            raise UserError(
                f"--mean-recurrence {mean} and --max-recurrence {cap} would draw from {2 * self.mean - cap:g} to "
                f"{cap}; give a mean whose double is whole, and a cap from that mean to its double less 1."
            )


def with_depth(plan: RecursionPlan, depth: int, window: int) -> RecursionPlan:
    """A plan at another depth, of whose core the last ``window`` passes carry gradient; 0: as it is."""
    plan = plan.with_blocks(depth)
    if not window:
        return plan
    recorded = [p.index for p in plan.passes if p.stack == "core"][-window:]
    passes = (replace(p, grad=p.index in recorded) if p.stack == "core" else p for p in plan.passes)
    return replace(plan, passes=tuple(passes))
