"""A plan is an argument of a step: a model trained at changing depth is, at each, the model built for that depth."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from megatron_recursive.plan import RecursionPlan, build_plan
from megatron_recursive.plan.step_plans import with_depth
from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import Case, Layout, Training, build_wrapped, full_gradients, run_schedule, train
from tests.unit_tests.models.comparing import worst_error

DEPTHS = (2, 1, 4, 3)
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000, "use_distributed_optimizer": True}
LAYOUTS = {
    "one process": (1, Layout()),
    "pp2": (2, Layout(pp=2)),
    "pp2, two phases, overlapped": (2, Layout(pp=2, phases="two", window=2, ddp=OVERLAP)),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "core, full": {"detach_between_refinements": False},
    "core, detach": {},
    "looped, exit gate": {"recursion_family": "looped", "exit_gate": True},
    "hierarchical": {"recursion_family": "hierarchical", "num_latent_refinements": 2, "latent_backprop_depth": "1"},
    "recurrent": {"recursion_family": "recurrent", "injection": "concat", "backprop_depth": 2,
                  "recurrence_step": "mean"},
}  # fmt: skip
QUICK = [(layout, family) for layout in LAYOUTS for family in ("recurrent",)]


def case_of(family: str) -> Case:
    return Case({"num_refinement_blocks": 3, "num_recurrences": 3, **FAMILIES[family]})


def plan_at(case: Case, depth: int) -> RecursionPlan:
    """As a step runs it that draws this depth."""
    knobs = case.resolved_recursion()
    return with_depth(build_plan(knobs), depth, knobs.backprop_depth)


def at_changing_depth(layout: Layout, family: str) -> list[Training]:
    case = case_of(family)
    wrapped, found = build_wrapped(case, layout), []
    for depth in DEPTHS:
        wrapped.zero_grad_buffer()
        metrics = run_schedule(wrapped, case, plan=plan_at(case, depth))
        with pytest.raises(ValueError, match="the model was built with another"):
            run_schedule(wrapped, case, plan=RecursionPlan.plain())
        found.append(Training([metrics], [full_gradients(wrapped)], [], {}))
    return found


def built_for_it(family: str) -> list[Training]:
    case = case_of(family)
    return [train(replace(case, plan=plan_at(case, depth)), Layout()) for depth in DEPTHS]


@cache
def expected(family: str) -> list[Training]:
    return run_distributed(built_for_it, 1, family, timeout=120)[0]


@pytest.mark.parametrize(("layout", "family"), grid(itertools.product(LAYOUTS, FAMILIES), QUICK))
def test_each_step_is_the_model_of_its_depth(layout: str, family: str) -> None:
    ranks, how = LAYOUTS[layout]
    found = run_distributed(at_changing_depth, ranks, how, family, timeout=120, rendezvous=30.0)
    for number, whole in enumerate(expected(family)):
        for rank in found:
            gradients = rank[number].gradients[0]
            error, name = worst_error({**whole.gradients[0], **gradients}, whole.gradients[0])
            assert gradients and error <= 1e-6, (DEPTHS[number], name, error)
        for metric, value in found[-1][number].metrics[0].items():
            assert value == pytest.approx(whole.metrics[0][metric], rel=1e-6, abs=1e-8), metric
