"""Buckets of gradients are reduced once a step, behind the last backward that reaches them, at any depth."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import Case, Layout, build_wrapped, run_schedule
from tests.parameters import EMBEDDING_STD, Tensors, full_gradients
from tests.unit_tests.pipeline.cases import FULL, FULL_RECOMPUTE, SUPERVISED_AFTER_FREE, SUPERVISED_HALTING
from tests.unit_tests.pipeline.test_ring import error_over_stages

DEPTHS = (2, 1, 4)  # blocks, one step each
BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 2000}


def plan_of_depth(blocks: int, detach: bool) -> RecursionPlan:
    knobs = RecursionConfig(num_refinement_blocks=blocks, num_latent_refinements=1, detach_between_refinements=detach)
    return build_plan(knobs.resolved(embedding_init_std=EMBEDDING_STD))


PLANS = {
    "full": [plan_of_depth(blocks, detach=False) for blocks in DEPTHS],
    "detach": [plan_of_depth(blocks, detach=True) for blocks in DEPTHS],
    "supervised": [SUPERVISED_HALTING, SUPERVISED_AFTER_FREE, SUPERVISED_HALTING],  # the head is used by every block
}


def steps(case: Case, layout: Layout, plans: list[RecursionPlan]) -> tuple[list[Tensors], list[tuple[int, int]]]:
    """Gradients by step, each step with a plan of its own; and of how many buckets how many were on their way when the
    last backward had ended."""
    wrapped = build_wrapped(case, layout)
    finish, early = wrapped.config.finalize_model_grads_func, []

    def count_and_finish(*args: Any, **kwargs: Any) -> Any:
        groups = wrapped.bucket_groups
        early.append((sum(group.grad_reduce_handle is not None for group in groups), len(groups)))
        return finish(*args, **kwargs)

    wrapped.config.finalize_model_grads_func = count_and_finish
    gradients = []
    for step, plan in enumerate(plans):
        wrapped.module.plan = plan
        wrapped.zero_grad_buffer()
        run_schedule(wrapped, case, step)
        gradients.append(full_gradients(wrapped))
    return gradients, early


@cache
def alone(kind: str) -> list[Tensors]:
    return run_distributed(steps, 1, Case(FULL, plan=PLANS[kind][0]), Layout(), PLANS[kind])[0][0]


HOW: dict[str, tuple[dict[str, Any], Layout]] = {
    "dp2": ({}, Layout(ddp=BUCKETS)),
    "dp2-recompute": (FULL_RECOMPUTE, Layout(ddp={**BUCKETS, "use_distributed_optimizer": True})),
    "dp2-recompute-passes": (FULL_RECOMPUTE, Layout(ddp=BUCKETS, recompute_passes=True)),
    "pp2-dp2": ({}, Layout(pp=2, ddp=BUCKETS)),
}
PAIRS = [(how, kind) for how in HOW for kind in PLANS]
QUICK = [("dp2-recompute", "full"), ("pp2-dp2", "full")]


@pytest.mark.parametrize(("how", "kind"), grid(PAIRS, QUICK))
def test_depth_may_change_from_step_to_step(how: str, kind: str) -> None:
    """With tied embeddings. Every bucket of the first stage is under way before the step's end, in the first step too;
    later stages have one bucket."""
    transformer, layout = HOW[how]
    case = Case(FULL, plan=PLANS[kind][0], transformer=transformer)
    ranks = run_distributed(steps, 2 * layout.pp, case, layout, PLANS[kind], timeout=120)
    for step, expected in enumerate(alone(kind)):
        for replica in range(2):
            stages = [ranks[stage * 2 + replica] for stage in range(layout.pp)]
            assert error_over_stages([gradients[step] for gradients, _ in stages], expected)[0] <= 1e-5, step
    for number, (_, early) in enumerate(ranks):
        assert all(started == of for started, of in early), early
        assert early[0][1] > 3 or number >= 2
