"""What a rank keeps: hidden tensors alive at the start of a pass, counted by their storages, against the formula."""

from __future__ import annotations

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
HIDDEN_BYTES = 4 * SEQ * MICRO_BATCH * HIDDEN


class HiddenTensors(TorchDispatchMode):
    """Knows every storage of the size of a hidden tensor that is still held, by Python or by the autograd graph."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() == HIDDEN_BYTES:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.storages[reference.cdata] = reference
        return result

    def alive(self) -> int:
        self.storages = {key: reference for key, reference in self.storages.items() if not reference.expired()}
        return len(self.storages)


@dataclass
class Peak:
    """The most of a rank: hidden tensors alive at the start of a pass, recorded passes, and what simulation says."""

    alive: int = 0
    recorded: int = 0
    simulated: int = 0


def peak(case: Case, layout: Layout) -> Peak:
    from megatron.core import parallel_state

    from megatron_recursive.models.recursive_gpt_model import RecursiveOutput
    from megatron_recursive.pipeline import ring_schedule
    from megatron_recursive.pipeline.pass_costs import equal_costs
    from megatron_recursive.pipeline.timeline import simulate

    watch, found, recorded = HiddenTensors(), Peak(), 0
    original = ring_schedule.RingStep.run_pass

    def backward_begins(_: Any) -> None:
        nonlocal recorded
        recorded -= 1

    def run_pass(step: Any, view: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal recorded
        found.alive = max(found.alive, watch.alive())
        output = original(step, view, *args, **kwargs)
        if view.decoder_pass.grad:
            recorded += 1
            found.recorded = max(found.recorded, recorded)
            (output.objective_BS if isinstance(output, RecursiveOutput) else output).register_hook(backward_begins)
        return output

    wrapped = build_wrapped(case, layout)
    run_schedule(wrapped, case)  # the parameters' gradient buffers exist from here on
    ring_schedule.RingStep.run_pass = run_pass  # type: ignore[method-assign]
    try:
        with watch:
            run_schedule(wrapped, case, 1)
    finally:
        ring_schedule.RingStep.run_pass = original  # type: ignore[method-assign]
    assert recorded == 0
    costs = equal_costs(wrapped.module.plan, layout.pp)
    timeline = simulate(costs, case.micro_batches, two_phases=layout.phases == "two")
    found.simulated = timeline.peak_live[parallel_state.get_pipeline_model_parallel_rank()]
    return found


def peaks(cases: list[tuple[Case, Layout]]) -> list[Peak]:
    return [peak(case, layout) for case, layout in cases]


# Every pair of stages, micro-batches and plan with phases.
GRID = [(2, 8, "full", "one"), (2, 4, "heavy", "two"), (2, 8, "heavy", "one"),
        (4, 4, "full", "one"), (4, 8, "heavy", "two"), (4, 4, "heavy", "one")]  # fmt: skip
QUICK = GRID[:2]


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


@pytest.mark.parametrize(("stages", "batches", "plan", "phases"), grid(GRID, QUICK))
def test_replayed_passes_keep_one_hidden_tensor_each(stages: int, batches: int, plan: str, phases: str) -> None:
    """Beside its recorded passes a rank holds a handful; stage 0 also two states and their gradients of each
    micro-batch under way. In two phases all are: stage 0 keeps two states of each, the last stage the one handed over.
    """
    ranks = replayed(stages, batches, plan, phases)
    handful, under_way = 11, min(batches, 2 * stages)
    for number, rank in enumerate(ranks):
        others = handful
        if number == 0:
            others = 4 * under_way + (2 * (batches - under_way) + 4 if phases == "two" else 0)
        elif number == stages - 1 and phases == "two":
            others += batches
        assert rank.alive <= rank.recorded + others


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
