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
from megatron_recursive.pipeline.timeline import Timeline, simulate
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


def plan_pipeline(
    plan: RecursionPlan, stages: int, micro_batches: int, shape: ModelShape | None = None, backward_cost: float = 2.0
) -> tuple[Timeline, dict[str, Any]]:
    """Simulate the ring, and put it beside the alternatives; without a shape all passes cost the same.

    The other number of phases; the *naive ring*, which sends one micro-batch at a time through all passes, forward and
    back; and plain Megatron 1F1B of the same layers passed once, at the same costs.
    """
    if stages < 2 or plan.num_passes < 2:
        raise UserError("--timeline draws the ring, which takes recursion and two stages or more; ask with --pp.")

    def costs_of(plan: RecursionPlan) -> PassCosts:
        if shape is None:
            return equal_costs(plan, stages, backward_cost)
        return price_passes(plan, shape, (shape.num_layers // stages,) * stages, backward_cost)

    started, names = time.perf_counter(), ("ring, one phase", "ring, two phases")
    costs, two = costs_of(plan), takes_two_phases(plan, stages, micro_batches)
    chosen = simulate(costs, micro_batches, two_phases=two)
    compared = {names[two]: (chosen.efficiency, chosen.makespan)}
    if plan.first_grad_pass:
        other = simulate(costs, micro_batches, two_phases=not two)
        compared[names[not two]] = other.efficiency, other.makespan
    naive = simulate(costs, 1)
    compared["naive ring"] = naive.efficiency, naive.makespan * micro_batches
    once = build_plan(RecursionConfig(enable_recursive_refinement=False).resolved(embedding_init_std=1.0))
    plain = simulate(costs_of(once), micro_batches, interleaved=False)
    compared["plain 1F1B, layers passed once"] = plain.efficiency, plain.makespan
    return chosen, {
        "stages": stages,
        "micro_batches": micro_batches,
        "passes": plan.num_passes,
        "passes_with_gradient": len(plan.grad_passes),
        "phases": 2 if two else 1,
        "schedules": {name: {"efficiency": e, "step_time": t} for name, (e, t) in compared.items()},
        "busy": chosen.busy,
        "idle": chosen.idle,
        "peak_live_activations": chosen.peak_live,
        "messages": messages(plan, micro_batches, two_phases=two),
        "seconds": time.perf_counter() - started,
    }


def messages(plan: RecursionPlan, micro_batches: int, *, two_phases: bool) -> dict[str, dict[str, int]]:
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
