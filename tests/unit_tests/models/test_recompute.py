"""Recomputing activations changes memory and time, and no gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from megatron_recursive.plan import DecoderPass, RecursionPlan
from tests.distributed import run_distributed
from tests.grids import chosen, grid
from tests.models import Case, Layout, Training, train
from tests.unit_tests.models.comparing import worst_error

HOW: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full-both-layers": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "passes": {"passes": True},
    "passes-and-layers": {
        "passes": True, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
    },
}
RECURSIONS: dict[str, dict[str, Any]] = {
    "detach": {},
    "full-gradient": {"detach_between_refinements": False},
    "norm-none": {"state_norm": "none", "state_init": "trunc-normal"},
}


def train_how(case: Case, options: dict[str, Any], layout: Layout) -> Training:
    options = {**options}
    layout = replace(layout, recompute_passes=options.pop("passes", False))
    return train(replace(case, transformer={**case.transformer, **options}), layout)


LAYOUTS = {"tp1": (Layout(), 0.0), "tp1-dropout": (Layout(), 0.1),
           "tp2-sp-dropout": (Layout(tp=2, sequence_parallel=True), 0.1)}  # fmt: skip
# Every pair of layout, recursion and way of recomputing.
TRIPLES = [(layout, list(RECURSIONS)[(at + place) % 3], how) for at, layout in enumerate(LAYOUTS)
           for place, how in enumerate(how for how in HOW if how != "none")]  # fmt: skip
QUICK = TRIPLES[1::8]


def train_all(pairs: list[tuple[str, str]], layout: Layout, dropout: float) -> dict[tuple[str, str], Training]:
    base = {"hidden_dropout": dropout, "attention_dropout": dropout}
    return {
        (name, how): train_how(Case(RECURSIONS[name], transformer=base, micro_batches=2), HOW[how], layout)
        for name, how in pairs
    }


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> Callable[[str], list[dict[tuple[str, str], Training]]]:
    triples = chosen(request, "layout", "recursion", "how")

    @cache
    def of(layout: str) -> list[dict[tuple[str, str], Training]]:
        asked = [pair for name, *pair in triples if name == layout]
        pairs = dict.fromkeys((recursion, each) for recursion, how in asked for each in ("none", how))
        how, dropout = LAYOUTS[layout]
        return run_distributed(train_all, how.tp, [*pairs], how, dropout, timeout=120)

    return of


@pytest.mark.parametrize(("layout", "recursion", "how"), grid(TRIPLES, QUICK))
def test_recompute_changes_no_gradient(trained: Any, layout: str, recursion: str, how: str) -> None:
    for rank in trained(layout):
        plain, recomputed = rank[recursion, "none"], rank[recursion, how]
        assert recomputed.metrics == plain.metrics
        assert worst_error(recomputed.gradients[0], plain.gradients[0])[0] <= 1e-6


def test_dropout_was_on() -> None:
    pairs = [("detach", "none")]
    (with_dropout,), (without,) = (run_distributed(train_all, 1, pairs, *LAYOUTS[n]) for n in ("tp1-dropout", "tp1"))
    assert with_dropout[pairs[0]].metrics != without[pairs[0]].metrics


# The first pass with gradient reads nothing that carries one: its layers must be trained all the same.
BLIND_START = RecursionPlan(
    "core",
    (
        DecoderPass(0, 0, "latent", ("output", "latent", "input"), grad=False),
        DecoderPass(1, 0, "output", ("output", "latent"), grad=False),
        DecoderPass(2, 1, "output", ("output", "latent"), grad=True, cuts_states=True),
        DecoderPass(3, 1, "latent", ("output", "latent", "input"), grad=True),
        DecoderPass(4, 1, "output", ("output", "latent"), grad=True, supervised_weight=1.0),
    ),
    embedding_multiplier=3.0,
)


def train_blind_start() -> dict[str, Training]:
    case = Case(plan=BLIND_START, micro_batches=2)
    return {how: train_how(case, options, Layout()) for how, options in HOW.items()}


def test_recompute_of_a_pass_whose_input_carries_no_gradient() -> None:
    training = run_distributed(train_blind_start, 1)[0]
    for recomputed in training.values():
        assert worst_error(recomputed.gradients[0], training["none"].gradients[0])[0] <= 1e-6
