"""Where the ring is hooked in, and that other models never see it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.models import Case, Layout, Training, build_wrapped, run_schedule, train
from tests.unit_tests.pipeline.cases import ADAM, FULL
from tests.unit_tests.pipeline.test_ring import error_over_stages, last_stage, metrics_error

PLAIN = Case({"enable_recursive_refinement": False}, optimizer=ADAM, steps=2, evaluate=True)
ONCE = {"recursion_family": "recurrent", "num_recurrences": 1}  # one trip, also of fewer micro-batches than stages
PIPELINE_SIZES = {"pp_size": 2, "vp_size": None}


def resolved_before_and_after() -> list[tuple[str, bool]]:
    """What Megatron resolves to: its module, and whether it still is what the first install put there."""
    from megatron.core.pipeline_parallel import schedules

    from megatron_recursive.pipeline import dispatch

    original = getattr(schedules, dispatch.NAME)
    original = getattr(original, "__wrapped__", original)
    setattr(schedules, dispatch.NAME, original)
    found = [(schedules.get_forward_backward_func(**PIPELINE_SIZES).__module__, True)]
    for _ in range(2):
        dispatch.install()
        function: Any = schedules.get_forward_backward_func(**PIPELINE_SIZES)
        found.append((function.__module__, function.__wrapped__ is original))
    return found


def test_megatron_resolves_the_name_at_call_time() -> None:
    """The hook is the one patch of Megatron. If this fails, get_forward_backward_func no longer reads the global."""
    before, first, second = run_distributed(resolved_before_and_after, 1)[0]
    assert before == ("megatron.core.pipeline_parallel.schedules", True)
    assert first == second == ("megatron_recursive.pipeline.dispatch", True)  # never a dispatcher around a dispatcher


def schedules_used(recursion: dict[str, Any]) -> list[str]:
    """The schedules of Megatron that one training step and one evaluation of a case of four layers reach, on two
    stages."""
    from megatron.core.pipeline_parallel import schedules

    from megatron_recursive.pipeline import dispatch

    dispatch.install()
    used: list[str] = []
    originals = {name: getattr(schedules, name) for name in (dispatch.NAME, dispatch.NAME.replace("without", "with"))}

    def spy(name: str, original: Any) -> Any:
        def spied(*args: Any, **kwargs: Any) -> Any:
            used.append(name.removeprefix("forward_backward_pipelining_"))
            return original(*args, **kwargs)

        return spied

    try:
        for name, original in originals.items():
            setattr(schedules, name, spy(name, getattr(original, "__wrapped__", original)))
        dispatch.install()
        case = Case(recursion, transformer={"num_layers": 4}, micro_batches=1 if "num_recurrences" in recursion else 4)
        wrapped = build_wrapped(case, Layout(pp=2, phases="one"))
        run_schedule(wrapped, case)
        run_schedule(wrapped, case, forward_only=True)
    finally:
        for name, original in originals.items():
            setattr(schedules, name, original)
    return used


@pytest.mark.parametrize(
    ("recursion", "schedule"),
    [({"enable_recursive_refinement": False}, "without_interleaving"), ({}, "with_interleaving"),
     (FULL, "with_interleaving"), ({**ONCE, "num_prelude_layers": 1, "num_coda_layers": 2}, "without_interleaving"),
     (ONCE, "without_interleaving")],
)  # fmt: skip
def test_recursive_models_of_more_than_one_trip_take_the_ring(recursion: dict[str, Any], schedule: str) -> None:
    for used in run_distributed(schedules_used, 2, recursion):
        assert used == [schedule, schedule]


def test_a_plain_model_trains_on_two_stages_as_on_one() -> None:
    expected: Training = run_distributed(train, 1, PLAIN, Layout())[0]
    ranks: list[Training] = run_distributed(train, 2, PLAIN, Layout(pp=2))
    for rank in last_stage(ranks):
        assert metrics_error(rank.metrics, expected.metrics) <= 1e-6
        assert metrics_error(rank.evaluations, expected.evaluations) <= 1e-6
    for step, gradients in enumerate(expected.gradients):
        assert error_over_stages([rank.gradients[step] for rank in ranks], gradients)[0] <= 1e-6
