"""The average of the weights: its formula, the model that has it for a while, and the training that goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import Case, Layout, build_optimizer, build_wrapped, run_schedule
from tests.parameters import gathered, named_parameters
from tests.unit_tests.models.comparing import worst_error
from tests.unit_tests.optimizers.test_layouts import CASES, SETTINGS

DECAY, STEPS = 0.75, 3
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
           "bucket_size": 2000}  # fmt: skip
ADAM = Case(optimizer=SETTINGS)
BF16 = replace(ADAM, transformer={"bf16": True})
RUNS = {
    "DP 2, gathers overlapped": (2, ADAM, Layout(ddp=OVERLAP)),
    "DP 2, gathers overlapped, bf16": (2, BF16, Layout(ddp=OVERLAP)),
    "PP 2, Muon": (2, CASES["muon"], Layout(pp=2)),
    "TP 2, bf16": (2, BF16, Layout(tp=2)),
}
Trace = list[dict[str, Tensor]]


def trace(case: Case, layout: Layout, evaluated: bool = True) -> tuple[Trace, Trace]:
    """Weights and averages of the model after each step, as one process would hold them."""
    from megatron_recursive.optimizers.weight_average import averages_of, in_place

    wrapped = build_wrapped(case, layout)
    optimizer = build_optimizer(case, layout, wrapped)
    averages = averages_of(optimizer, DECAY)
    late = bool(layout.ddp.get("overlap_param_gather"))

    def held() -> dict[str, Tensor]:
        mine = {name: parameter.data.clone() for name, parameter in named_parameters(wrapped).items()}
        return {name: value.clone() for name, value in gathered(mine, wrapped).items()}

    weights, averaged = [held()], []
    for step in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        run_schedule(wrapped, case, step)
        optimizer.step()
        if evaluated or step == STEPS - 1:
            if late:
                wrapped.disable_forward_pre_hook(param_sync=True)  # as Megatron does around an evaluation
            weights.append(held())
            with in_place(averages, [wrapped]):
                averaged.append(held())
                run_schedule(wrapped, case, 100, forward_only=True)
            again = held()
            assert all(torch.equal(again[name], weights[-1][name]) for name in again)
            if late:
                wrapped.enable_forward_pre_hook()
    return weights, averaged


def test_it_is_its_formula() -> None:
    ((weights, averaged),) = run_distributed(trace, 1, ADAM, Layout())
    expected = weights[0]
    for now, average in zip(weights[1:], averaged, strict=True):
        expected = {name: DECAY * expected[name] + (1 - DECAY) * now[name] for name in now}
        assert worst_error(average, expected)[0] <= 1e-6
        assert worst_error(average, now)[0] > 1e-4


@pytest.mark.parametrize("run", grid(RUNS, quick=["DP 2, gathers overlapped, bf16"]))
def test_a_layout_has_the_same_average_and_trains_on_as_if_nothing_was_evaluated(run: str) -> None:
    ranks, case, layout = RUNS[run]
    ((_, serial),) = run_distributed(trace, 1, case, Layout())
    never = run_distributed(trace, ranks, case, layout, evaluated=False)
    for (weights, averaged), (others, _) in zip(run_distributed(trace, ranks, case, layout), never, strict=True):
        assert all(torch.equal(weights[-1][name], value) for name, value in others[-1].items())
        for average, expected in zip(averaged, serial, strict=True):
            mine: Any = {name: expected[name] for name in average}
            assert worst_error(average, mine)[0] <= (2e-2 if case.transformer.get("bf16") else 2e-5)
