"""What a rank keeps: hidden tensors alive at the start of a pass, counted by their storages, against the formula."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import HIDDEN, MICRO_BATCH, SEQ, Case, Layout, build_wrapped, make_batches, run_schedule
from tests.unit_tests.pipeline.cases import FULL_RECOMPUTE

FOUR_LAYERS = {"num_layers": 4}
LAST = {"halt_supervision": "last"}
FULL = Case({"num_refinement_blocks": 3, "detach_between_refinements": False, **LAST}, transformer=FOUR_LAYERS)
HEAVY = Case({"num_refinement_blocks": 4, **LAST}, transformer=FOUR_LAYERS)  # 9 of 12 passes carry no gradient
ELEMENTS = SEQ * MICRO_BATCH * HIDDEN


class HiddenTensors(TorchDispatchMode):
    """Knows every storage of the size of a hidden tensor, or of an fp32 copy of it, that is still held, by Python or by
    the autograd graph."""

    def __init__(self, element: int = 4, parameters: Iterable[torch.nn.Parameter] = ()) -> None:
        super().__init__()
        self.weights = {StorageWeakRef(p.untyped_storage()).cdata for p in parameters}  # an op may return a view of one
        self.storages: dict[int, StorageWeakRef] = {}
        self.sizes = {ELEMENTS * size: size / element for size in (element, 4)}
        self.counts: dict[int, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() in self.sizes:
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata in self.weights:
                    continue
                self.storages[reference.cdata] = reference
                self.counts[reference.cdata] = self.sizes[tensor.untyped_storage().nbytes()]
        return result

    def alive(self) -> float:
        """In hidden tensors."""
        self.storages = {key: reference for key, reference in self.storages.items() if not reference.expired()}
        return sum(self.counts[key] for key in self.storages)


@dataclass
class Peak:
    """The most of a rank: hidden tensors alive at the start of a pass, recorded passes, and what simulation says."""

    alive: float = 0
    recorded: int = 0
    simulated: int = 0
    states: int = 0


def peak(case: Case, layout: Layout) -> Peak:
    from megatron.core.utils import get_attr_wrapped_model

    from megatron_recursive.accounting.memory import states_held
    from megatron_recursive.models.recursion_core import RecursiveOutput
    from megatron_recursive.pipeline import ring_schedule
    from megatron_recursive.pipeline.pass_costs import equal_costs
    from megatron_recursive.pipeline.planner import chosen_windows, step_of
    from megatron_recursive.pipeline.windows import most_held

    found, recorded = Peak(), 0
    original = ring_schedule.RingStep.run_trip

    def backward_begins(_: Any) -> None:
        nonlocal recorded
        recorded -= 1

    def run_trip(step: Any, view: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal recorded
        found.alive = max(found.alive, watch.alive())
        output = original(step, view, *args, **kwargs)
        if view.trip.grad:
            recorded += 1
            found.recorded = max(found.recorded, recorded)
            (output.objective_BS if isinstance(output, RecursiveOutput) else output).register_hook(backward_begins)
        return output

    wrapped = build_wrapped(case, layout)
    model = get_attr_wrapped_model(wrapped, "plan", return_model_obj=True)
    run_schedule(wrapped, case)  # the parameters' gradient buffers exist from here on
    watch = HiddenTensors(2 if case.transformer.get("bf16") else 4, wrapped.parameters())
    ring_schedule.RingStep.run_trip = run_trip  # type: ignore[method-assign]
    try:
        with watch:
            run_schedule(wrapped, case, 1)
    finally:
        ring_schedule.RingStep.run_trip = original  # type: ignore[method-assign]
    assert recorded == 0
    plan = model.plan
    costs, rank = equal_costs(plan, layout.pp), model.pg_collection.pp.rank()
    windows = chosen_windows(costs, case.micro_batches, layout.phases, layout.window)
    step = step_of(costs, case.micro_batches, windows)
    found.simulated = int(most_held(costs.grad, layout.pp, case.micro_batches, windows, rank, costs.grad))
    if rank == 0:
        found.states = states_held(layout.pp, step.in_flight, step.window)
    elif rank == layout.pp - 1:
        halting = sum(p.halt_weight > 0 and p.supervised_weight == 0 for p in plan.passes)
        found.states = max(step.in_flight, step.window) * max(halting, 1)
    return found


def peaks(cases: list[tuple[Case, Layout]]) -> list[Peak]:
    return [peak(case, layout) for case, layout in cases]


# Every pair of stages, micro-batches and plan with phases; the first has fewer micro-batches, and costs half.
GRID = [(2, 4, "full", "one"), (2, 4, "heavy", "two"), (2, 8, "full", "one"), (2, 8, "heavy", "one"),
        (4, 4, "full", "one"), (4, 8, "heavy", "two"), (4, 4, "heavy", "one")]  # fmt: skip
QUICK = GRID[:1]


@cache
def replayed(stages: int, batches: int, plan: str, phases: str) -> list[Peak]:
    """Of a point of GRID, by rank, with passes replayed."""
    case = replace({"full": FULL, "heavy": HEAVY}[plan], micro_batches=batches)
    return run_distributed(peak, stages, case, Layout(pp=stages, phases=phases, recompute_passes=True), timeout=120)


@pytest.mark.parametrize(("stages", "batches", "plan", "phases"), grid(GRID, QUICK))
def test_recorded_passes_keep_to_the_formula(stages: int, batches: int, plan: str, phases: str) -> None:
    recording = 9 if plan == "full" else 3
    for rank in replayed(stages, batches, plan, phases):
        assert rank.recorded == rank.simulated
        if phases == "two" or plan == "full":  # in between stand grad-free passes, which make it less
            assert rank.recorded <= min(2 * (stages - 1) + (recording - 1) * stages + 1, batches * recording)


HANDFUL = 9  # hidden tensors in flight


@pytest.mark.parametrize(("stages", "batches", "plan", "phases"), grid(GRID, QUICK))
def test_replayed_passes_keep_one_hidden_tensor_each(stages: int, batches: int, plan: str, phases: str) -> None:
    """Beside its recorded passes a rank holds a handful, and what accounting says of states."""
    for rank in replayed(stages, batches, plan, phases):
        assert rank.alive <= rank.recorded + rank.states + HANDFUL


def window_peaks(stages: int) -> dict[tuple[bool, int], Peak]:
    """By precision and number of micro-batches, in windows of two a stage; all halting states are kept."""
    layout, found = Layout(pp=stages, phases="two", window=2 * stages, recompute_passes=True), {}
    for bf16, batches in ((False, 2 * stages), (False, 8 * stages), (True, 8 * stages)):
        transformer = {**FOUR_LAYERS, "bf16": bf16}
        case = Case({"num_refinement_blocks": 3}, transformer=transformer, micro_batches=batches)
        found[bf16, batches] = peak(case, layout)
    return found


@pytest.mark.parametrize("stages", grid([2, 4], quick=[]))
def test_memory_is_a_function_of_the_window(stages: int) -> None:
    """And not of the number of micro-batches; in bf16 no state is kept in fp32."""
    for rank in run_distributed(window_peaks, stages, stages, timeout=180):
        few = rank[False, 2 * stages]
        for found in rank.values():
            assert found.alive <= few.alive + 1 and found.states == few.states
            assert 0.7 * found.states <= found.alive <= found.recorded + found.states + HANDFUL


@pytest.mark.grid
def test_recompute_brings_memory_down() -> None:
    """On two stages of two layers, nine passes with gradient."""
    kinds = {
        "none": (FULL, Layout(pp=2)),
        "layers": (replace(FULL, transformer={**FOUR_LAYERS, **FULL_RECOMPUTE}), Layout(pp=2)),
        "passes": (FULL, Layout(pp=2, recompute_passes=True)),
    }
    for rank in run_distributed(peaks, 2, list(kinds.values())):
        alive = {kind: found.alive for kind, found in zip(kinds, rank, strict=True)}
        assert alive["passes"] < 0.75 * alive["layers"] < 0.3 * alive["none"]


def alive_behind_a_step(case: Case, layout: Layout) -> tuple[float, int]:
    """Hidden tensors that a step leaves in cycles of references, and of how many phases it gave a zero gradient."""
    from megatron_recursive.pipeline import ring_schedule

    wrapped, answered = build_wrapped(case, layout), set[int]()
    run_schedule(wrapped, case)
    answer = ring_schedule.RingStep._answer

    def noting(step: Any, received: Any, trip: Any) -> Any:
        kept = answer(step, received, trip)
        answered.update([id(step)] * (step.zeros is not None))
        return kept

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch, HiddenTensors(parameters=wrapped.parameters()) as watch:
            patch.setattr(ring_schedule.RingStep, "_answer", noting)
            run_schedule(wrapped, case, 1)
            return watch.alive(), len(answered)
    finally:
        gc.enable()


def test_a_step_leaves_no_hidden_tensor_to_the_garbage_collector() -> None:
    case = Case({"num_refinement_blocks": 2, **LAST}, micro_batches=2)
    assert run_distributed(alive_behind_a_step, 2, case, Layout(pp=2, phases="one")) == [(0, 1)] * 2


def alive_after_forward(case: Case, recompute_passes: bool) -> int:
    """Hidden tensors that the graph of one whole forward pass holds, in one process."""
    model = build_wrapped(case, Layout(recompute_passes=recompute_passes)).module
    (batch,) = make_batches(replace(case, micro_batches=1), 0)
    with HiddenTensors() as watch:
        output = model(**batch)
        assert output.objective_BS.requires_grad
        return watch.alive()


def test_without_stages_a_replayed_pass_keeps_one_hidden_tensor() -> None:
    """Six passes more, six hidden tensors more."""
    longer = replace(FULL, recursion={**FULL.recursion, "num_refinement_blocks": 5})
    (short,), (long,) = (run_distributed(alive_after_forward, 1, case, True) for case in (FULL, longer))
    (kept,) = run_distributed(alive_after_forward, 1, FULL, False)
    assert long - short == 6
    assert short < 0.1 * kept
