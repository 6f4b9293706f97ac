"""A plan is an argument of a step: a model trained at changing depth is, at each, the model built for that depth."""

from __future__ import annotations

from functools import cache

import pytest

from megatron_recursive.plan import RecursionPlan
from tests.distributed import run_distributed
from tests.models import Case, Layout, Training, build_wrapped, full_gradients, run_schedule, train
from tests.unit_tests.models.comparing import worst_error

DEPTHS = (2, 1, 4, 3)
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000, "use_distributed_optimizer": True}
LAYOUTS = {
    "one process": (1, Layout()),
    "pp2": (2, Layout(pp=2)),
    "pp2, two phases, overlapped": (2, Layout(pp=2, phases="two", window=2, ddp=OVERLAP)),
}


def case_of(blocks: int, detach: bool) -> Case:
    return Case({"num_refinement_blocks": blocks, "detach_between_refinements": detach})


def at_changing_depth(layout: Layout, detach: bool) -> list[Training]:
    case = case_of(3, detach)
    wrapped, found = build_wrapped(case, layout), []
    for blocks in DEPTHS:
        wrapped.zero_grad_buffer()
        metrics = run_schedule(wrapped, case, plan=wrapped.module.plan.with_blocks(blocks))
        with pytest.raises(ValueError, match="another embedding_multiplier than"):
            run_schedule(wrapped, case, plan=RecursionPlan.plain())
        found.append(Training([metrics], [full_gradients(wrapped)], [], {}))
    return found


def built_for_it() -> dict[tuple[int, bool], Training]:
    return {(blocks, detach): train(case_of(blocks, detach), Layout()) for blocks in DEPTHS for detach in (True, False)}


@cache
def expected() -> dict[tuple[int, bool], Training]:
    return run_distributed(built_for_it, 1, timeout=120)[0]


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_step_is_the_model_of_its_depth(layout: str, detach: bool) -> None:
    ranks, how = LAYOUTS[layout]
    found = run_distributed(at_changing_depth, ranks, how, detach, timeout=120, rendezvous=30.0)
    for number, blocks in enumerate(DEPTHS):
        whole = expected()[blocks, detach]
        for rank in found:
            gradients = rank[number].gradients[0]
            error, name = worst_error({**whole.gradients[0], **gradients}, whole.gradients[0])
            assert gradients and error <= 1e-6, (blocks, name, error)
        for metric, value in found[-1][number].metrics[0].items():
            assert value == pytest.approx(whole.metrics[0][metric], rel=1e-6, abs=1e-8), metric
