"""A pipeline of the ring before it is run: its simulated step beside the alternatives, as plain data."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

from megatron_recursive.accounting import ModelShape
from megatron_recursive.errors import UserError
from megatron_recursive.pipeline.pass_costs import PassCosts, equal_costs, price_passes
from megatron_recursive.pipeline.ring_schedule import microbatch_group_size, two_phases_are_faster
from megatron_recursive.pipeline.timeline import Progress, Timeline, simulate
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan

SIMULATED_GROUPS = 3  # the schedule repeats from group to group of micro-batches


@dataclass(frozen=True)
class Step:
    """A training step over pipeline stages.

    Attributes:
        makespan: in the unit of its costs. efficiency: work over stages times makespan.
        live: the most recorded passes that each stage holds at once.
        in_flight: micro-batches whose states the first stage holds at once.
    """

    makespan: float
    efficiency: float
    live: tuple[int, ...]
    in_flight: int


def takes_two_phases(plan: RecursionPlan, stages: int, micro_batches: int, phases: str = "auto") -> bool:
    """As a run would decide with the same ``--pipeline-phases``."""
    wanted = phases == "two" or (phases == "auto" and two_phases_are_faster(stages, micro_batches))
    return wanted and min(plan.first_grad_pass, plan.num_passes - plan.first_grad_pass) >= 2


def simulated_step(plan: RecursionPlan, costs: PassCosts, micro_batches: int, phases: str = "auto") -> Step:
    """A step of the ring, or of 1F1B of a plain model; of many micro-batches, from what each further group adds."""
    stages, busy = costs.stages, sum(costs.busy(micro_batches))
    if stages == 1:
        return Step(busy, 1.0, (len(plan.grad_passes),), 1)
    two, group = takes_two_phases(plan, stages, micro_batches, phases), microbatch_group_size(stages, micro_batches)
    few = micro_batches if micro_batches % group else min(micro_batches, SIMULATED_GROUPS * group)
    makespan, live = _simulated(costs, few, two, not plan.is_plain)
    if few < micro_batches:
        before, _ = _simulated(costs, few - group, two, not plan.is_plain)
        makespan += (micro_batches - few) / group * (makespan - before)
    in_flight = 1 if plan.is_plain else micro_batches if two else group
    return Step(makespan, busy / (stages * makespan), live, in_flight)


@functools.lru_cache(maxsize=256)
def _simulated(costs: PassCosts, batches: int, two_phases: bool, interleaved: bool) -> tuple[float, tuple[int, ...]]:
    timeline = simulate(costs, batches, two_phases=two_phases, interleaved=interleaved)
    return timeline.makespan, tuple(timeline.peak_live)


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
            raise UserError("--timeline needs a layout of two pipeline stages or more; ask for one with --pp.")
        if self.micro_batches < self.stages:
            raise UserError(
                f"{self.micro_batches} micro-batches are less than --pp {self.stages}; the ring needs at least one a "
                "stage, so give a larger --global-batch-size."
            )
        if self.shape is not None and self.layers_per_stage is None and self.shape.num_layers % self.stages:
            raise UserError(f"--num-layers {self.shape.num_layers} is not divisible by --pp {self.stages}.")

    def costs(self, plan: RecursionPlan) -> PassCosts:
        if self.shape is None:
            return equal_costs(plan, self.stages, self.backward_cost)
        split = self.layers_per_stage or (self.shape.num_layers // self.stages,) * self.stages
        return price_passes(plan, self.shape, split, self.backward_cost)

    @property
    def two_phases(self) -> bool:
        return takes_two_phases(self.plan, self.stages, self.micro_batches, self.phases)


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
