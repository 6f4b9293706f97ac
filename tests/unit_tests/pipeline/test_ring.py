"""The ring is the unpipelined model reached another way: losses, metrics, all gradients, norms and trained weights."""

from __future__ import annotations

from functools import cache

import pytest

from tests.distributed import run_distributed
from tests.models import Case, Layout, Training, train
from tests.parameters import Tensors
from tests.unit_tests.models.comparing import worst_error
from tests.unit_tests.pipeline.cases import ADAM, ALL_CASES, LAYOUTS

PAIRS = [(layout, case) for layout, (_, _, cases) in LAYOUTS.items() for case in cases]


def train_all(cases: dict[str, Case], layout: Layout) -> dict[str, Training]:
    return {name: train(case, layout) for name, case in cases.items()}


@cache
def serial() -> dict[str, Training]:
    return run_distributed(train_all, 1, ALL_CASES, Layout(), timeout=180)[0]


@cache
def ring(layout: str) -> list[dict[str, Training]]:
    ranks, how, names = LAYOUTS[layout]
    return run_distributed(train_all, ranks, {name: ALL_CASES[name] for name in names}, how, timeout=240)


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


@pytest.mark.parametrize(("layout", "case"), PAIRS)
class TestRingEqualsSerial:
    def test_losses_and_metrics(self, layout: str, case: str) -> None:
        for rank in last_stage([rank[case] for rank in ring(layout)]):
            assert metrics_error(rank.metrics, serial()[case].metrics) <= tolerance(layout)

    def test_evaluation(self, layout: str, case: str) -> None:
        assert bool(serial()[case].evaluations) == ALL_CASES[case].evaluate
        for rank in last_stage([rank[case] for rank in ring(layout)]):
            assert metrics_error(rank.evaluations, serial()[case].evaluations) <= tolerance(layout)

    def test_all_gradients(self, layout: str, case: str) -> None:
        for step, expected in enumerate(serial()[case].gradients):
            mine = [rank[case].gradients[step] for rank in ring(layout)]
            assert error_over_stages(mine, expected)[0] <= tolerance(layout)

    def test_gradient_norm(self, layout: str, case: str) -> None:
        expected = serial()[case].gradient_norms
        assert all(norm > ADAM["clip_grad"] for norm in expected)
        for rank in ring(layout):
            assert rank[case].gradient_norms == pytest.approx(expected, rel=tolerance(layout))

    def test_trained_parameters(self, layout: str, case: str) -> None:
        mine = [rank[case].parameters for rank in ring(layout)]
        assert error_over_stages(mine, serial()[case].parameters)[0] <= tolerance(layout)
