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
from megatron_recursive.pipeline.windows import in_flight, microbatch_group_size, window_sizes
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plan.trips import Trip, free_trips, trips_of

SIMULATED_GROUPS = 3  # the schedule repeats from group to group of micro-batches


@dataclass(frozen=True)
class Step:
    """A training step over pipeline stages.

    Attributes:
        makespan: in the unit of its costs. efficiency: work over stages times makespan.
        in_flight: micro-batches that are under way at once.
        windows: micro-batches of each window of two phases; none in one phase.
    """

    makespan: float
    efficiency: float
    in_flight: int
    windows: tuple[int, ...] = ()

    @property
    def window(self) -> int:
        return max(self.windows, default=0)


@functools.lru_cache(maxsize=256)
def chosen_windows(
    costs: PassCosts, micro_batches: int, phases: str = "auto", window: int = 0
) -> tuple[int, ...]:
    """The micro-batches of each window of two phases in which a run takes a step; none where it takes one phase.

    ``phases`` and ``window`` are ``--pipeline-phases`` and ``--pipeline-window``; ``auto`` takes what is faster by
    simulation.
    """
    stages = costs.stages
    if window and window < stages:
        raise UserError(f"--pipeline-window {window} is less than --pipeline-model-parallel-size {stages}; a window "
                        "takes at least one micro-batch for each stage.")  # fmt: skip
    windows = possible_windows(costs, micro_batches, window)
    if phases == "auto" and windows:
        one, two = (step_of(costs, micro_batches, sizes).makespan for sizes in ((), windows))
        return windows if two < one * (1 - 1e-9) else ()  # not by rounding: all ranks must decide alike
    return windows if phases == "two" else ()


def possible_windows(costs: PassCosts, micro_batches: int, window: int = 0) -> tuple[int, ...]:
    """The windows of two phases, each of which needs two trips, as the interleaved schedule does; none otherwise."""
    free = free_trips(costs.grad)
    runs = costs.stages > 1 and min(free, len(costs.grad) - free) >= 2
    return window_sizes(costs.stages, micro_batches, window) if runs else ()


def said_of_phases(costs: PassCosts, micro_batches: int, phases: str = "auto", window: int = 0) -> str:
    """What a run takes, and why, in a line."""
    windows = chosen_windows(costs, micro_batches, phases, window)
    two = possible_windows(costs, micro_batches, window)
    efficiency = step_of(costs, micro_batches).efficiency
    if len(costs.grad) == 1:
        return f"one trip around the stages, on plain 1F1B ({efficiency:.3f} efficient)"
    one = f"one phase {efficiency:.3f} efficient"
    if not two:
        return f"one phase, since two need two trips each ({one})"
    why = "the faster by simulation" if phases == "auto" else f"--pipeline-phases {phases}"
    taken = "one phase"
    if windows:
        taken = f"two phases in {_count(windows)} of up to {max(windows)} micro-batches"
    return f"{taken} ({why}: {one}, two {step_of(costs, micro_batches, two).efficiency:.3f})"


def simulated_step(costs: PassCosts, micro_batches: int, window: int = 0) -> Step:
    """A step as a run would take it."""
    if costs.stages == 1:
        return Step(sum(costs.busy(micro_batches)), 1.0, 1)
    return step_of(costs, micro_batches, chosen_windows(costs, micro_batches, window=window))


def step_of(costs: PassCosts, micro_batches: int, windows: tuple[int, ...] = ()) -> Step:
    """A step in these windows, or in one phase; of many micro-batches, from what each further group or window adds."""
    stages, interleaved = costs.stages, len(costs.grad) > 1
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
    return Step(makespan, efficiency, in_flight(stages, micro_batches, windows, interleaved=interleaved), windows)


def _count(windows: Sequence[int]) -> str:
    return f"{len(windows)} window{'s' * (len(windows) > 1)}"


@functools.lru_cache(maxsize=256)
def _simulated(costs: PassCosts, sizes: tuple[int, ...], in_windows: bool, interleaved: bool) -> float:
    return simulate(costs, sum(sizes), windows=sizes if in_windows else (), interleaved=interleaved).makespan


def plan_pipeline(
    plan: RecursionPlan, stages: int, micro_batches: int, shape: ModelShape | None = None, backward_cost: float = 2.0,
    window: int = 0, layers_per_stage: Sequence[int] = (),
) -> tuple[Timeline, dict[str, Any]]:  # fmt: skip
    """Simulate the ring, and put it beside the alternatives; without a shape all passes cost the same.

    The other number of phases; the *naive ring*, which sends one micro-batch at a time through all trips, forward and
    back; and plain Megatron 1F1B of the same layers passed once, at the same costs. Stages are equal if not given.
    """
    if stages < 2 or plan.is_plain:
        raise UserError("--timeline draws the ring, which takes recursion and two stages or more; ask with --pp.")

    split = tuple(layers_per_stage)
    if shape is not None:
        split = split or (shape.num_layers // stages,) * stages

    def costs_of(plan: RecursionPlan) -> PassCosts:
        if shape is None:
            return equal_costs(plan, stages, backward_cost, split)
        return price_passes(plan, shape, split, backward_cost)

    started, costs, trips = time.perf_counter(), costs_of(plan), trips_of(plan, split)
    windows, ring = chosen_windows(costs, micro_batches, window=window), len(trips) > 1
    chosen = simulate(costs, micro_batches, windows=windows, interleaved=ring)
    compared: dict[str, tuple[float, float]] = {}
    for sizes in dict.fromkeys(((), possible_windows(costs, micro_batches, window))):
        step = chosen if sizes == windows else simulate(costs, micro_batches, windows=sizes)
        one = "ring, one phase" if ring else "one trip, plain 1F1B"
        compared[f"ring, two phases, {_count(sizes)}" if sizes else one] = step.efficiency, step.makespan
    naive = simulate(costs, 1, interleaved=ring)
    compared["naive ring"] = naive.efficiency, naive.makespan * micro_batches
    once = build_plan(RecursionConfig(enable_recursive_refinement=False).resolved(embedding_init_std=1.0))
    plain = simulate(costs_of(once), micro_batches, interleaved=False)
    compared["plain 1F1B, layers passed once"] = plain.efficiency, plain.makespan
    return chosen, {
        "stages": stages,
        "micro_batches": micro_batches,
        "passes": plan.num_passes,
        "passes_with_gradient": len(plan.grad_passes),
        "trips": [list(passes) for passes in costs.passes],
        "phases": 2 if windows else 1,
        "windows": list(windows),
        "schedules": {name: {"efficiency": e, "step_time": t} for name, (e, t) in compared.items()},
        "busy": chosen.busy,
        "idle": chosen.idle,
        "peak_live_activations": chosen.peak_live,
        "messages": messages(plan, trips, micro_batches, two_phases=bool(windows)),
        "seconds": time.perf_counter() - started,
    }


def messages(
    plan: RecursionPlan, trips: Sequence[Trip], micro_batches: int, *, two_phases: bool
) -> dict[str, dict[str, int]]:
    """Hidden tensors over a boundary in a step: between neighbours, and from the last stage round to the first.

    ``forward`` go on and ``backward`` come back, of which ``zero answers`` carry no gradient.
    """
    free = free_trips([trip.grad for trip in trips]) if two_phases else 0
    zeros = sum(not trip.around.grad for trip in trips[free:])
    inner = {"forward": len(trips), "backward": len(trips) - free, "zero answers": zeros}
    first = free + 1  # what stage 0 begins with is not answered, nor the handover into a second phase
    wrapping = trips[first:]
    cut = [trip for trip in wrapping if not plan.feeds_gradient(trips[trip.index - 1].last)]
    ring = {"forward": len(trips) - 1, "backward": len(wrapping), "zero answers": len(cut)}
    scaled = {"neighbours": inner, "last to first": ring}
    return {where: {kind: micro_batches * n for kind, n in counts.items()} for where, counts in scaled.items()}
