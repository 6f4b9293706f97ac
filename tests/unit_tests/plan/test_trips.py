"""Which passes share a trip around the pipeline stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plan.trips import trips_of


def recurrent(prelude: int, coda: int, **knobs: Any) -> RecursionPlan:
    config = RecursionConfig(recursion_family="recurrent", num_prelude_layers=prelude, num_coda_layers=coda, **knobs)
    return build_plan(config.resolved(embedding_init_std=0.02))


def numbers(plan: RecursionPlan, split: tuple[int, ...]) -> list[list[int]]:
    trips = trips_of(plan, split)
    assert [trip.index for trip in trips] == list(range(len(trips)))
    assert [p for trip in trips for p in trip.passes] == list(plan.passes)
    return [[p.index + 1 for p in trip.passes] for trip in trips]


APART = [[1], [2], [3], [4], [5]]
FOLDED = [[1, 2], [3], [4, 5]]


@pytest.mark.parametrize(("split", "expected"), [
    ((), APART), ((8,), APART),  # no stages, or one
    ((4, 4), FOLDED), ((2, 2, 2, 2), FOLDED), ((3, 1, 1, 3), FOLDED), ((2, 6), FOLDED), ((6, 2), FOLDED),
    ((1, 1, 4, 2), [[1], [2], [3], [4, 5]]),  # a prelude on two stages
    ((2, 4, 1, 1), [[1, 2], [3], [4], [5]]),  # a coda on two stages
    ((2, 5, 1, 0), [[1, 2], [3], [4], [5]]),  # a last stage of no layers
])  # fmt: skip
def test_stacks_that_one_stage_holds_alone_are_no_trips(split: tuple[int, ...], expected: list[list[int]]) -> None:
    plan = recurrent(2, 2, num_recurrences=3, injection="add")
    assert numbers(plan, split) == expected
    free = recurrent(2, 2, num_recurrences=3, injection="add", backprop_depth=1)
    assert numbers(free, split) == expected
    if expected == FOLDED:  # the first trip is recorded on the first stage, for the sake of the prelude alone
        assert [trip.grad for trip in trips_of(free, split)] == [True, False, True]
        assert [trip.around.grad for trip in trips_of(free, split)] == [False, False, True]


def test_a_coda_that_reads_a_part_of_the_way_is_a_trip() -> None:
    """The state before it is on the first stage; r = 1 goes all the way."""
    for step in ("mean", "0.3"):
        assert numbers(recurrent(2, 2, num_recurrences=3, recurrence_step=step), (4, 4)) == [[1, 2], [3], [4], [5]]
    assert numbers(recurrent(2, 2, num_recurrences=1, recurrence_step="mean"), (4, 4)) == [[1, 2, 3]]


def test_other_families_are_as_many_trips_as_passes() -> None:
    for family in ("core", "looped", "hierarchical"):
        plan = build_plan(RecursionConfig(recursion_family=family).resolved(embedding_init_std=0.02))
        assert numbers(plan, (2, 2)) == [[p.index + 1] for p in plan.passes]


def test_a_coda_reads_nothing_but_the_result_before_it() -> None:
    plan = recurrent(0, 2, num_recurrences=2, injection="add")
    *before, coda = plan.passes
    assert numbers(plan, (2, 2)) == [[1], [2, 3]]
    for other in ({"reads": ("output", "input")}, {"cuts_states": True}, {"reads": ("input",)}):
        assert numbers(replace(plan, passes=(*before, replace(coda, **other))), (2, 2)) == [[1], [2], [3]]
