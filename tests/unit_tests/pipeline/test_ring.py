"""The ring is the unpipelined model reached another way: losses, metrics, all gradients, norms and trained weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from tests.distributed import run_distributed
from tests.grids import chosen, grid
from tests.models import Case, Layout, Training, train
from tests.parameters import Tensors
from tests.unit_tests.models.comparing import worst_error
from tests.unit_tests.pipeline.cases import ADAM, ALL_CASES, LAYOUTS, QUICK

Serial, Ring = dict[str, Training], Callable[[str], list[dict[str, Training]]]
PAIRS = [(layout, case) for layout, (_, _, cases) in LAYOUTS.items() for case in cases]
EVALUATED = [pair for pair in PAIRS if ALL_CASES[pair[1]].evaluate]
TRAINED = [pair for pair in PAIRS if ALL_CASES[pair[1]].optimizer]


def train_all(cases: dict[str, Case], layout: Layout) -> dict[str, Training]:
    return {name: train(case, layout) for name, case in cases.items()}


@pytest.fixture(scope="module")
def serial(request: pytest.FixtureRequest) -> Serial:
    """In one process, documents kept apart by a mask of S x S."""
    names = dict.fromkeys(case for _, case in chosen(request, "layout", "case"))
    cases = {name: replace(ALL_CASES[name], masked=True) for name in names}
    return run_distributed(train_all, 1, cases, Layout(), timeout=180)[0]


@pytest.fixture(scope="module")
def ring(request: pytest.FixtureRequest) -> Ring:
    """By layout, what every rank has."""
    pairs = chosen(request, "layout", "case")

    @cache
    def of(layout: str) -> list[dict[str, Training]]:
        ranks, how, _ = LAYOUTS[layout]
        cases = {case: ALL_CASES[case] for asked, case in pairs if asked == layout}
        return run_distributed(train_all, ranks, cases, how, timeout=240, rendezvous=30.0)

    return of


def tolerance(layout: str) -> float:
    """Tensor parallelism sums every matrix product in another order; the ring alone only some gradients."""
    return 5e-6 if LAYOUTS[layout][1].tp > 1 else 1e-6


def error_over_stages(ranks: list[Tensors], expected: Tensors) -> tuple[float, str]:
    """The worst error on any rank, each of which holds the parameters of its stage; together they hold all."""
    assert set().union(*ranks) == set(expected)
    return max(worst_error({**expected, **mine}, expected) for mine in ranks)


def metrics_error(mine: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    assert [list(step) for step in mine] == [list(step) for step in expected]
    pairs = [(m[name], e[name]) for m, e in zip(mine, expected, strict=True) for name in e]
    return max((abs(m - e) / max(abs(e), 1e-3) for m, e in pairs), default=0.0)


def last_stage(ranks: list[Training]) -> list[Training]:
    reporting = [rank for rank in ranks if rank.metrics[0]]
    assert reporting
    return reporting


@pytest.mark.parametrize(("layout", "case"), grid(PAIRS, QUICK))
def test_losses_and_metrics(serial: Serial, ring: Ring, layout: str, case: str) -> None:
    for rank in last_stage([rank[case] for rank in ring(layout)]):
        assert metrics_error(rank.metrics, serial[case].metrics) <= tolerance(layout)


@pytest.mark.parametrize(("layout", "case"), grid(EVALUATED, QUICK))
def test_evaluation(serial: Serial, ring: Ring, layout: str, case: str) -> None:
    assert len(serial[case].evaluations) == ALL_CASES[case].steps
    for rank in last_stage([rank[case] for rank in ring(layout)]):
        assert metrics_error(rank.evaluations, serial[case].evaluations) <= tolerance(layout)


@pytest.mark.parametrize(("layout", "case"), grid(PAIRS, QUICK))
def test_all_gradients(serial: Serial, ring: Ring, layout: str, case: str) -> None:
    for step, expected in enumerate(serial[case].gradients):
        mine = [rank[case].gradients[step] for rank in ring(layout)]
        assert error_over_stages(mine, expected)[0] <= tolerance(layout)


@pytest.mark.parametrize(("layout", "case"), grid(TRAINED, QUICK))
def test_gradient_norm_and_trained_parameters(serial: Serial, ring: Ring, layout: str, case: str) -> None:
    expected = serial[case]
    assert len(expected.gradient_norms) > 1 and min(expected.gradient_norms) > ADAM["clip_grad"]
    for rank in ring(layout):
        assert rank[case].gradient_norms == pytest.approx(expected.gradient_norms, rel=tolerance(layout))
    mine = [rank[case].parameters for rank in ring(layout)]
    assert error_over_stages(mine, expected.parameters)[0] <= tolerance(layout)
