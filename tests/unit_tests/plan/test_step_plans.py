"""The depth of each step: its distribution, its curriculum, and the plan that it makes."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionConfig, StepPlans, build_plan
from megatron_recursive.plan.depth_distributions import grown, mean_of, poisson_lognormal

DRAWN = {"recurrence_distribution": "poisson-lognormal"}
RECURRENT = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "injection": "add"}


def plans(*, seed: int = 1, iterations: int = 100, **knobs: Any) -> StepPlans:
    config = RecursionConfig(**knobs).resolved(embedding_init_std=0.1)
    return StepPlans(config, build_plan(config), seed=seed, iterations=iterations)


def sampled(location: float, cap: int, draws: int = 40_000) -> Counter[int]:
    """The formula, drawn: min(cap, 1 + Poisson(rate)), rate ~ LogNormal(location, 0.5)."""
    source, found = random.Random(3), Counter[int]()
    for _ in range(draws):
        limit, product, events = math.exp(-math.exp(source.gauss(location, 0.5))), source.random(), 0
        while product > limit:
            product, events = product * source.random(), events + 1
        found[min(cap, 1 + events)] += 1
    return found


def test_the_distribution_is_its_formula() -> None:
    mean, cap = 4.0, 9
    chances = poisson_lognormal(mean, cap, calibrated=False)
    found = sampled(math.log(mean) - 0.125, cap)
    assert sum(chances) == pytest.approx(1) and len(chances) == cap
    assert [found[depth] / 40_000 for depth in range(1, cap + 1)] == pytest.approx(chances, abs=0.01)
    assert mean_of(poisson_lognormal(mean, 500, calibrated=False)) == pytest.approx(mean + 1, abs=1e-9)  # Huginn's


@pytest.mark.parametrize(("mean", "cap"), [(1, 4), (3, 6), (4, 16), (8, 64), (5.9, 6)])
def test_the_capped_mean_is_the_asked_one(mean: float, cap: int) -> None:
    assert mean_of(poisson_lognormal(mean, cap)) == pytest.approx(mean, abs=1e-9)


def test_draws_are_of_seed_and_iteration_alone() -> None:
    mine = plans(**RECURRENT, **DRAWN, num_recurrences=3, max_recurrence=6)
    drawn = [mine.depth_at(step) for step in range(4000)]
    again = plans(**RECURRENT, **DRAWN, num_recurrences=3, max_recurrence=6)
    assert [again.depth_at(step) for step in reversed(range(4000))] == drawn[::-1]
    other = plans(**RECURRENT, **DRAWN, num_recurrences=3, max_recurrence=6, seed=2)
    assert [other.depth_at(step) for step in range(100)] != drawn[:100]
    assert sum(drawn) / 4000 == pytest.approx(3, abs=0.1) and set(drawn) == {1, 2, 3, 4, 5, 6}
    assert drawn[:12] == [2, 5, 2, 4, 3, 1, 2, 3, 4, 1, 1, 5]  # of every version: a resumed run draws the same
    uniform = plans(recurrence_distribution="uniform", mean_recurrence=2.5)
    assert {uniform.depth_at(step) for step in range(99)} == {1, 2, 3, 4}


@pytest.mark.parametrize("knobs", [
    {**RECURRENT, "num_recurrences": 3}, {**RECURRENT, "num_recurrences": 3, "backprop_depth": 2},
    {**RECURRENT, "num_recurrences": 2, "backprop_depth": 4, "recurrence_step": "mean"},
    {}, {"detach_between_refinements": False}, {"recursion_family": "looped"},
    {"recursion_family": "looped", "exit_gate": True}, {"recursion_family": "hierarchical"},
])  # fmt: skip
def test_the_plan_of_a_step_is_that_of_a_model_of_its_depth(knobs: dict[str, Any]) -> None:
    """k passes carry gradient, or r where fewer are drawn; steps of ``mean`` are 1 / r."""
    mine = plans(**knobs, **DRAWN, max_recurrence=6)
    for step in range(12):
        depth, found = mine.depth_at(step), mine.plan_at(step)
        name = "num_recurrences" if "num_recurrences" in knobs else "num_refinement_blocks"
        if depth == 1 and knobs.get("exit_gate"):  # such a model is not built
            assert found.num_passes == 1
            continue
        built = build_plan(RecursionConfig(**{**knobs, name: depth}).resolved(embedding_init_std=0.1))
        for p, q in zip(found.passes, built.passes, strict=True):
            assert p.halt_weight == pytest.approx(q.halt_weight)
            assert replace(p, halt_weight=0.0) == replace(q, halt_weight=0.0), depth
        assert replace(found, passes=built.passes) == built
        assert (found is mine.plan) == (found == mine.plan)


def test_curricula_grow_depth_and_gradient() -> None:
    knobs = {**RECURRENT, "num_recurrences": 8, "backprop_depth": 4, "recurrence_curriculum": "linear",
             "recurrence_curriculum_fraction": 0.5, "backprop_curriculum": "1-sqrt",
             "backprop_curriculum_fraction": 1.0}  # fmt: skip
    found = [plans(**knobs).plan_at(step) for step in range(100)]
    assert [plan.depth for plan in found] == [min(8, max(1, math.ceil(8 * step / 50))) for step in range(100)]
    graded = [sum(p.grad for p in plan.passes if p.stack == "core") for plan in found]
    assert graded == [min(plan.depth, max(1, math.ceil(4 * (1 - math.sqrt(1 - step / 100)))))
                      for step, plan in enumerate(found)]  # fmt: skip
    assert found[99].depth == 8 and graded[99] == 4
    drawn = plans(**RECURRENT, **DRAWN, num_recurrences=8, recurrence_curriculum="linear", iterations=40_000)
    means = [sum(drawn.depth_at(step) for step in range(start, start + 1000)) / 1000 for start in (0, 4000, 20_000)]
    assert means == [1.0, pytest.approx(drawn.expected_depth(4500), abs=0.3), pytest.approx(8, abs=0.3)]
    assert drawn.expected_depth(4500) == pytest.approx(4) and drawn.expected_depth() == pytest.approx(8)


@pytest.mark.parametrize(("knobs", "said"), [
    ({**RECURRENT, "backprop_depth": 5}, "--backprop-depth 5 is above 4, the deepest"),
    ({**RECURRENT, **DRAWN, "backprop_depth": 7, "max_recurrence": 6}, "--backprop-depth 7 is above 6"),
    ({**DRAWN, "num_refinement_blocks": 1, "mean_recurrence": 3}, "--recurrence-distribution .* a depth of 1"),
    ({**DRAWN, "mean_recurrence": 6, "max_recurrence": 6}, "--mean-recurrence 6 must be below .* 6 .--max-recurrence"),
    ({"recurrence_distribution": "uniform", "mean_recurrence": 2.25}, "from 0.5 to 4; give a mean whose double is"),
    ({"recurrence_distribution": "uniform", "max_recurrence": 6}, "from 0 to 6; give a mean"),
    ({"recurrence_distribution": "uniform", "max_recurrence": 2}, "from 4 to 2; give a mean"),
    ({**DRAWN, **RECURRENT, "mean_recurrence": 1e6, "backprop_depth": 2}, "depths of up to 4000000; give --max-recurr"),
    ({"mean_recurrence": 3.0}, "--mean-recurrence says nothing without --recurrence-distribution"),
    ({"recurrence_distribution": "uniform", "uncalibrated_recurrence": True}, "--uncalibrated-recurrence says nothing"),
    ({"recurrence_curriculum_fraction": 0.5}, "says nothing without --recurrence-curriculum"),
    ({**RECURRENT, "backprop_curriculum": "linear"}, "--backprop-curriculum says nothing without --backprop-depth"),
    ({"recurrence_curriculum": "linear", "recurrence_curriculum_fraction": 1.5}, "at most 1, the whole training"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plans(**knobs)


@pytest.mark.parametrize("knobs", [DRAWN, {"backprop_curriculum": "linear"}])
def test_a_step_without_gradient_for_all_weights_is_refused_before_it_is_drawn(knobs: dict[str, Any]) -> None:
    """Nothing injected: the prelude is reached by the first pass alone, and four of four are recorded."""
    with pytest.raises(UserError, match="'embedding' would receive no gradient"):
        plans(**{**RECURRENT, "injection": "none"}, num_recurrences=4, backprop_depth=4, iterations=1, **knobs)


def test_carried_steps_are_evaluated_in_a_row() -> None:
    mine = plans(num_supervision_steps=4, recurrence_distribution="uniform")
    assert "evaluated and exported at 12" in mine.describe()


def test_a_curriculum_takes_its_steps_where_whole_numbers_say() -> None:
    """The float 25 * (28 / 100) is above 7."""
    for length in (50, 75, 100):
        assert all(grown(25, "linear", at / length) == max(1, -(-25 * at // length)) for at in range(length))
