"""A pipeline of the ring before it is run: its simulated step beside the alternatives, as plain data."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_recursive.accounting import ModelShape
from megatron_recursive.errors import UserError
from megatron_recursive.pipeline.pass_costs import PassCosts, equal_costs, price_passes
from megatron_recursive.pipeline.timeline import Timeline, simulate
from megatron_recursive.pipeline.windows import in_flight, live_passes, microbatch_group_size, window_sizes
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan

SIMULATED_GROUPS = 3  # the schedule repeats from group to group of micro-batches


@dataclass(frozen=True)
class Step:
    """A training step over pipeline stages.

    Attributes:
        makespan: in the unit of its costs. efficiency: work over stages times makespan.
        live: the most recorded passes that each stage holds at once.
        in_flight: micro-batches that are under way at once.
        windows: micro-batches of each window of two phases; none in one phase.
    """

    makespan: float
    efficiency: float
    live: tuple[int, ...]
    in_flight: int
    windows: tuple[int, ...] = ()

    @property
    def window(self) -> int:
        return max(self.windows, default=0)


@functools.lru_cache(maxsize=64)
def chosen_windows(
    plan: RecursionPlan, costs: PassCosts, micro_batches: int, phases: str = "auto", window: int = 0
) -> tuple[int, ...]:
    """The micro-batches of each window of two phases in which a run takes a step; none where it takes one phase.

    ``phases`` and ``window`` are ``--pipeline-phases`` and ``--pipeline-window``; ``auto`` takes what is faster by
    simulation.
    """
    stages = costs.stages
    if window and window < stages:
        raise UserError(f"--pipeline-window {window} is less than --pipeline-model-parallel-size {stages}; a window "
                        "takes at least one micro-batch for each stage.")  # fmt: skip
    windows = possible_windows(plan, stages, micro_batches, window)
    if phases == "auto" and windows:
        one, two = (step_of(costs, micro_batches, sizes).makespan for sizes in ((), windows))
        return windows if two < one * (1 - 1e-9) else ()  # not by rounding: all ranks must decide alike
    return windows if phases == "two" else ()


def possible_windows(plan: RecursionPlan, stages: int, micro_batches: int, window: int = 0) -> tuple[int, ...]:
    """The windows of two phases, each of which needs two passes, as the interleaved schedule does; none otherwise."""
    runs = stages > 1 and min(plan.first_grad_pass, plan.num_passes - plan.first_grad_pass) >= 2
    return window_sizes(stages, micro_batches, window) if runs else ()


def said_of_phases(
    plan: RecursionPlan, costs: PassCosts, micro_batches: int, phases: str = "auto", window: int = 0
) -> str:
    """What a run takes, and why, in a line."""
    windows = chosen_windows(plan, costs, micro_batches, phases, window)
    two = possible_windows(plan, costs.stages, micro_batches, window)
    one = f"one phase {step_of(costs, micro_batches).efficiency:.3f} efficient"
    if not two:
        return f"one phase, since two need two passes each ({one})"
    why = "the faster by simulation" if phases == "auto" else f"--pipeline-phases {phases}"
    taken = "one phase"
    if windows:
        taken = f"two phases in {_count(windows)} of up to {max(windows)} micro-batches"
    return f"{taken} ({why}: {one}, two {step_of(costs, micro_batches, two).efficiency:.3f})"


def simulated_step(plan: RecursionPlan, costs: PassCosts, micro_batches: int, phases: str = "auto",
                   window: int = 0) -> Step:  # fmt: skip
    """A step of the ring as a run would take it, or of 1F1B of a plain model."""
    if costs.stages == 1:
        return Step(sum(costs.busy(micro_batches)), 1.0, (len(plan.grad_passes),), 1)
    windows = chosen_windows(plan, costs, micro_batches, phases, window)
    return step_of(costs, micro_batches, windows, interleaved=not plan.is_plain)


def step_of(costs: PassCosts, micro_batches: int, windows: tuple[int, ...] = (), *, interleaved: bool = True) -> Step:
    """A step in these windows, or in one phase; of many micro-batches, from what each further group or window adds."""
    stages = costs.stages
    if windows:
        kinds = tuple(dict.fromkeys(windows))
        makespan = _simulated(costs, kinds, True, interleaved)
        for size in kinds:
            if more := windows.count(size) - 1:
                again = _simulated(costs, (size, size), True, interleaved)
                makespan += more * (again - _simulated(costs, (size,), True, interleaved))
    else:
        group = microbatch_group_size(stages, micro_batches)
        few = micro_batches if micro_batches % group else min(micro_batches, SIMULATED_GROUPS * group)
        makespan = _simulated(costs, (few,), False, interleaved)
        if few < micro_batches:
            before = _simulated(costs, (few - group,), False, interleaved)
            makespan += (micro_batches - few) / group * (makespan - before)
    efficiency = sum(costs.busy(micro_batches)) / (stages * makespan)
    live = live_passes(costs.grad, stages, micro_batches, windows, interleaved=interleaved)
    return Step(makespan, efficiency, live, in_flight(stages, micro_batches, windows, interleaved=interleaved), windows)


def _count(windows: Sequence[int]) -> str:
    return f"{len(windows)} window{'s' * (len(windows) > 1)}"


@functools.lru_cache(maxsize=256)
def _simulated(costs: PassCosts, sizes: tuple[int, ...], in_windows: bool, interleaved: bool) -> float:
    return simulate(costs, sum(sizes), windows=sizes if in_windows else (), interleaved=interleaved).makespan


def plan_pipeline(
    plan: RecursionPlan, stages: int, micro_batches: int, shape: ModelShape | None = None, backward_cost: float = 2.0,
    window: int = 0,
) -> tuple[Timeline, dict[str, Any]]:  # fmt: skip
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

    started, costs = time.perf_counter(), costs_of(plan)
    windows = chosen_windows(plan, costs, micro_batches, window=window)
    chosen = simulate(costs, micro_batches, windows=windows)
    compared: dict[str, tuple[float, float]] = {}
    for sizes in dict.fromkeys(((), possible_windows(plan, stages, micro_batches, window))):
        step = chosen if sizes == windows else simulate(costs, micro_batches, windows=sizes)
        name = f"ring, two phases, {_count(sizes)}" if sizes else "ring, one phase"
        compared[name] = step.efficiency, step.makespan
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
        "phases": 2 if windows else 1,
        "windows": list(windows),
        "schedules": {name: {"efficiency": e, "step_time": t} for name, (e, t) in compared.items()},
        "busy": chosen.busy,
        "idle": chosen.idle,
        "peak_live_activations": chosen.peak_live,
        "messages": messages(plan, micro_batches, two_phases=bool(windows)),
        "seconds": time.perf_counter() - started,
    }


def messages(plan: RecursionPlan, micro_batches: int, *, two_phases: bool) -> dict[str, dict[str, int]]:
    """Hidden tensors over a boundary in a step: between neighbours, and from the last stage round to the first.

    ``forward`` go on and ``backward`` come back, of which ``zero answers`` carry no gradient.
    """
    free = plan.first_grad_pass
    answered = plan.num_passes - free if two_phases else plan.num_passes
    zeros = sum(not p.grad for p in plan.passes[free if two_phases else 0 :])
    inner = {"forward": plan.num_passes, "backward": answered, "zero answers": zeros}
    first = free + 1 if two_phases else 1  # the two-phase handover into pass `free` is not answered
    wrapping = plan.passes[first:]
    cut = [p for p in wrapping if not plan.feeds_gradient(plan.passes[p.index - 1])]
    ring = {"forward": plan.num_passes - 1, "backward": len(wrapping), "zero answers": len(cut)}
    scaled = {"neighbours": inner, "last to first": ring}
    return {where: {kind: micro_batches * n for kind, n in counts.items()} for where, counts in scaled.items()}
