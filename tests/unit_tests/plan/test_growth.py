"""When a model grows, what it then is, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionConfig, build_plan
from megatron_recursive.plan.growth import Growth
from tests.unit_tests.plan.test_step_plans import DRAWN, RECURRENT, plans


@pytest.mark.parametrize(("knobs", "then"), [
    ({"num_refinement_blocks": 1}, {"num_refinement_blocks": 4}),
    ({"recursion_family": "looped", "num_refinement_blocks": 2, "exit_gate": True}, {"num_refinement_blocks": 4}),
    ({"recursion_family": "hierarchical", "num_refinement_blocks": 2, "latent_backprop_depth": "2"},
     {"num_refinement_blocks": 4}),
    ({**RECURRENT, "num_recurrences": 2, "recurrence_step": "mean", "backprop_depth": 3}, {"num_recurrences": 4}),
])  # fmt: skip
def test_it_becomes_the_model_of_the_other_depth(knobs: dict[str, Any], then: dict[str, Any]) -> None:
    mine = plans(**knobs, grow_depth_at="0.77:4", iterations=201)
    assert mine.growth.at == 154 and mine.changes and "behind iteration 154 4" in mine.describe()
    built = build_plan(RecursionConfig(**{**knobs, **then}).resolved(embedding_init_std=0.1))
    assert all(mine.plan_at(step) == mine.plan for step in (0, 153))
    assert all(mine.plan_at(step) == built for step in (154, 200))
    assert mine.own_plan(154) == mine.plan and mine.own_plan(155) == mine.deepest == built
    after = mine.growth.config_after(155)
    assert after == replace(RecursionConfig(**{**knobs, **then}).resolved(embedding_init_std=0.1))
    assert mine.growth.config_after(154) is mine.config


def test_supervision_steps_of_a_grown_model_run_in_a_row() -> None:
    mine = plans(num_refinement_blocks=2, num_supervision_steps=3, grow_depth_at="0.5:4", iterations=100)
    assert mine.served_plan().depth == 12 and mine.served_plan(50).depth == 6 and mine.own_plan(50).depth == 2
    assert "exported at 3 times that of its last step" in mine.describe()


def test_it_grows_behind_the_fraction_that_was_written() -> None:
    """The float 0.29 * 100 is below 29."""
    grows = [Growth(RecursionConfig(grow_depth_at=f"{part}:4"), 100).at for part in (".29", "0.57", "0.58", "0.77")]
    assert grows == [29, 57, 58, 77]


def test_the_rate_rises_anew_over_its_iterations() -> None:
    growth = Growth(RecursionConfig(grow_depth_at=".5:4", grow_rewarm_iters=4), 20)
    assert [growth.rate_factor(step) for step in (0, 9, 10, 11, 13, 19)] == [1, 1, 0.25, 0.5, 1, 1]
    assert Growth(RecursionConfig(grow_depth_at=".5:4"), 20).rate_factor(10) == 1


@pytest.mark.parametrize(("knobs", "said"), [
    ({"grow_depth_at": "0.5:3"}, "--grow-depth-at 0.5:3 does not deepen a model of --num-refinement-blocks 3"),
    ({**RECURRENT, "grow_depth_at": "0.5:2"}, "does not deepen a model of --num-recurrences 4"),
    *(({"grow_depth_at": bad}, "must be FRACTION:K, a fraction between 0 and 1")
      for bad in ("", "0:4", "0.0:4", "1:4", "1.5:4", "-0.5:4", "77%:4", "0.5", "0.5:0", "0.5:4.5", "nan:4")),
    ({"grow_depth_at": "0.5:4", "enable_recursive_refinement": False}, "needs a depth to grow"),
    ({"grow_depth_at": "0.5:4", **DRAWN}, "--grow-depth-at 0.5:4 and --recurrence-distribution both set the depth"),
    ({"grow_depth_at": "0.5:4", "recurrence_curriculum": "linear"}, "and --recurrence-curriculum both set"),
    ({"grow_depth_at": "0.009:4"}, "--grow-depth-at 0.009:4 of 100 iterations is their start"),
    ({"grow_rewarm_iters": 4}, "--grow-rewarm-iters 4 says nothing without --grow-depth-at"),
    ({"grow_depth_at": "0.5:4", "grow_rewarm_iters": -1}, "--grow-rewarm-iters must be 0 or more"),
    # What it would become is looked at before the training, not when it grows.
    ({"recursion_family": "recurrent", "num_recurrences": 2, "backprop_depth": 2, "grow_depth_at": "0.5:4"},
     "would receive no gradient"),
])  # fmt: skip
def test_what_does_not_grow_is_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plans(**knobs)
