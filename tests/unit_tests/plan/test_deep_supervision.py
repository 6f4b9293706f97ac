"""Deep supervision in the plan: the weights of the blocks, where gradient goes, and what is left of it at weight 0."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionConfig, RecursionPlan, StepPlans, build_plan
from megatron_recursive.plan.deep_supervision import block_weights, share_of, supervised

WRITTEN = {"constant": [0.5, 0.5, 1], "linear_decay": [0.5 / 3, 1 / 3, 1], "exponential_decay": [0.125, 0.25, 1]}
FAMILIES: dict[str, dict[str, Any]] = {
    "core": {}, "core, cut": {"detach_between_refinements": True}, "looped": {"recursion_family": "looped"},
    "hierarchical": {"recursion_family": "hierarchical", "latent_backprop_depth": "2"},
}  # fmt: skip


def config_of(family: str, blocks: int = 3, **knobs: Any) -> RecursionConfig:
    knobs |= {"num_refinement_blocks": blocks, "embedding_multiplier": 1.0, **FAMILIES[family]}
    return RecursionConfig(enable_deep_supervision=True, **knobs)


def plain(config: RecursionConfig) -> RecursionPlan:
    return build_plan(dataclasses.replace(config, enable_deep_supervision=False))


@pytest.mark.parametrize("schedule", WRITTEN)
def test_the_weights_are_the_formula_over_their_sum(schedule: str) -> None:
    total = sum(WRITTEN[schedule])
    expected = [weight / total for weight in WRITTEN[schedule]]
    assert block_weights(config_of("core", deep_supervision_schedule=schedule), 3) == pytest.approx(expected)
    for family in FAMILIES:
        plan = build_plan(config_of(family, deep_supervision_schedule=schedule))
        assert [p.supervised_weight for p in plan.block_ends] == pytest.approx(expected)
        assert RecursionPlan.from_json(plan.to_json()) == plan


def test_blocks_that_are_cut_apart_carry_the_gradient_of_their_own_loss() -> None:
    cut, whole = build_plan(config_of("core, cut")), build_plan(config_of("core"))
    assert all(p.grad for plan in (cut, whole) for p in plan.passes)
    assert [p.index for p in cut.passes if p.cuts_states] == [7, 14] and not any(p.cuts_states for p in whole.passes)
    assert not cut.feeds_gradient(cut.block_ends[0]) and whole.feeds_gradient(whole.block_ends[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_at_no_weight_the_plan_is_the_one_without(family: str) -> None:
    config = config_of(family)
    assert supervised(build_plan(config), config, 0.0) == plain(config) != build_plan(config)
    assert supervised(plain(config), plain_config := dataclasses.replace(config, enable_deep_supervision=False)) == (
        build_plan(plain_config))  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_at_another_depth_it_is_the_plan_of_that_depth(family: str) -> None:
    start = config_of(family)
    for blocks in (2, 5):
        config = config_of(family, blocks)
        assert supervised(build_plan(start).with_blocks(blocks), config).passes == build_plan(config).passes
    assert sum(p.supervised_weight for p in build_plan(start).with_blocks(5).passes) == pytest.approx(1)


def test_a_ramp_goes_from_start_to_end() -> None:
    config = config_of("core", deep_supervision_warmup=(10, 30))
    assert [share_of((10, 30), iteration) for iteration in (0, 10, 15, 30, 99)] == [0, 0, 0.25, 1, 1]
    steps = StepPlans(config, build_plan(config), iterations=40)
    assert steps.changes and [steps.plan_at(iteration) for iteration in (0, 10)] == [plain(config_of("core"))] * 2
    assert [p.supervised_weight for p in steps.plan_at(15).block_ends] == pytest.approx([1 / 10, 1 / 10, 8 / 10])
    assert steps.plan_at(30) is steps.plan_at(39) is steps.plan and "from iteration 10 on" in steps.describe()
    assert steps.counts() == {plain(config_of("core")): 11, steps.plan: 29}
    with pytest.raises(UserError, match="--deep-supervision-warmup 10 30 ends behind the 29 iterations"):
        StepPlans(config, build_plan(config), iterations=29)
    assert not StepPlans(config, build_plan(config).heads_only(), iterations=29).changes
    assert not StepPlans(config, build_plan(config)).changes, "of a run that is not known"


def test_a_drawn_depth_has_the_weights_of_its_blocks() -> None:
    config = config_of("looped", recurrence_distribution="uniform", mean_recurrence=3)
    steps = StepPlans(config, build_plan(config), iterations=40)
    found = {plan.num_blocks: plan for plan in map(steps.plan_at, range(40))}
    assert set(found) == {1, 2, 3, 4, 5}
    for blocks, plan in found.items():
        assert [p.supervised_weight for p in plan.passes] == pytest.approx(block_weights(config, blocks))


def test_heads_alone_have_no_loss_to_supervise() -> None:
    config = config_of("core")
    heads = build_plan(config).heads_only()
    assert heads == plain(config).heads_only() == supervised(heads, config)
