"""A pipeline of the ring before it is run: its simulated step beside the alternatives, as plain data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from megatron_recursive.accounting import ModelShape
from megatron_recursive.errors import UserError
from megatron_recursive.pipeline.pass_costs import PassCosts, equal_costs, price_passes
from megatron_recursive.pipeline.ring_schedule import two_phases_are_faster
from megatron_recursive.pipeline.timeline import Progress, Timeline, simulate
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan


@dataclass(frozen=True)
class Pipeline:
    """What is planned. ``layers_per_stage`` None splits evenly; ``shape`` None makes all passes equal."""

    plan: RecursionPlan
    stages: int
    micro_batches: int
    shape: ModelShape | None = None
    layers_per_stage: tuple[int, ...] | None = None
    backward_cost: float = 2.0
    phases: str = "auto"

    def __post_init__(self) -> None:
        if self.plan.num_passes < 2:
            raise UserError("The ring needs a plan of two passes or more; leave out --disable-recursive-refinement.")
        if self.stages < 2:
            raise UserError(f"--pp {self.stages} is no pipeline; give at least 2.")
        if self.micro_batches < self.stages:
            raise UserError(
                f"--micro-batches {self.micro_batches} is less than --pp {self.stages}; the ring needs at least one "
                "micro-batch per stage."
            )
        if not self.backward_cost > 0:
            raise UserError(f"--backward-cost must be positive, but is {self.backward_cost}.")
        if self.shape is not None:
            self._check_split(self.shape.num_layers)

    def _check_split(self, layers: int) -> None:
        split = self.layers_per_stage
        if split is None:
            if layers % self.stages:
                raise UserError(f"--num-layers {layers} is not divisible by --pp {self.stages}; say how to split them "
                                "with --layers-per-stage.")  # fmt: skip
        elif len(split) != self.stages or sum(split) != layers or min(split) < 1:
            raise UserError(
                f"--layers-per-stage must be {self.stages} positive numbers (--pp) that add up to {layers} "
                f"(--num-layers), but is {' '.join(map(str, split))}."
            )

    def costs(self, plan: RecursionPlan) -> PassCosts:
        if self.shape is None:
            return equal_costs(plan, self.stages, self.backward_cost)
        split = self.layers_per_stage or (self.shape.num_layers // self.stages,) * self.stages
        return price_passes(plan, self.shape, split, self.backward_cost)

    @property
    def two_phases(self) -> bool:
        """As a run would decide with the same --pipeline-phases."""
        wanted = self.phases == "two"
        if self.phases == "auto":
            wanted = two_phases_are_faster(self.stages, self.micro_batches)
        return wanted and self.plan.first_grad_pass > 0


def plan_pipeline(pipeline: Pipeline, progress: Progress | None = None) -> tuple[Timeline, dict[str, Any]]:
    """Simulate the chosen schedule, and put it beside the alternatives.

    The other number of phases; the *naive ring*, which sends one micro-batch at a time through all passes, forward and
    back; and plain Megatron 1F1B of the same layers passed once, at the same costs.
    """
    started = time.perf_counter()
    plan, stages, batches = pipeline.plan, pipeline.stages, pipeline.micro_batches
    costs, names = pipeline.costs(plan), ("ring, one phase", "ring, two phases")
    chosen = simulate(costs, batches, two_phases=pipeline.two_phases, progress=progress)
    compared = {names[pipeline.two_phases]: (chosen.efficiency, chosen.makespan)}
    if plan.first_grad_pass:
        other = simulate(costs, batches, two_phases=not pipeline.two_phases, progress=progress)
        compared[names[not pipeline.two_phases]] = other.efficiency, other.makespan
    naive = simulate(costs, 1)
    compared["naive ring"] = naive.efficiency, naive.makespan * batches
    once = build_plan(RecursionConfig(enable_recursive_refinement=False).resolved(embedding_init_std=1.0))
    plain = simulate(pipeline.costs(once), batches, interleaved=False)
    compared["plain 1F1B, layers passed once"] = plain.efficiency, plain.makespan
    return chosen, {
        "stages": stages,
        "micro_batches": batches,
        "passes": plan.num_passes,
        "passes_with_gradient": len(plan.grad_passes),
        "phases": 2 if pipeline.two_phases else 1,
        "schedules": {name: {"efficiency": e, "step_time": t} for name, (e, t) in compared.items()},
        "busy": chosen.busy,
        "idle": chosen.idle,
        "peak_live_activations": chosen.peak_live,
        "messages": messages(plan, stages, batches, two_phases=pipeline.two_phases),
        "seconds": time.perf_counter() - started,
    }


def messages(plan: RecursionPlan, stages: int, micro_batches: int, *, two_phases: bool) -> dict[str, dict[str, int]]:
    """Hidden tensors over a boundary in a step: between neighbours, and from the last stage round to the first.

    ``forward`` go on and ``backward`` come back, of which ``zero answers`` carry no gradient.
    """
    free = plan.first_grad_pass
    answered = plan.num_passes - free if two_phases else plan.num_passes
    inner = {"forward": plan.num_passes, "backward": answered, "zero answers": 0 if two_phases else free}
    first = free + 1 if two_phases else 1  # the two-phase handover into pass `free` is not answered
    wrapping = plan.passes[first:]
    cut = [p for p in wrapping if p.cuts_states or not (p.grad and plan.passes[p.index - 1].grad)]
    ring = {"forward": plan.num_passes - 1, "backward": len(wrapping), "zero answers": len(cut)}
    scaled = {"neighbours": inner, "last to first": ring}
    return {where: {kind: micro_batches * n for kind, n in counts.items()} for where, counts in scaled.items()}
