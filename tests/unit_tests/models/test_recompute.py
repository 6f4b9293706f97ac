"""Recomputing activations changes memory and time, and no gradient."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from megatron_recursive.plan import DecoderPass, RecursionPlan
from tests.distributed import run_distributed
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


def train_all(dropout: float, layout: Layout) -> dict[tuple[str, str], Training]:
    base = {"hidden_dropout": dropout, "attention_dropout": dropout}
    return {
        (name, how): train_how(Case(recursion, transformer=base, micro_batches=2), options, layout)
        for name, recursion in RECURSIONS.items()
        for how, options in HOW.items()
    }


@cache
def trained(dropout: float, layout: str) -> list[dict[tuple[str, str], Training]]:
    how = {"tp1": Layout(), "tp2-sp": Layout(tp=2, sequence_parallel=True)}[layout]
    return run_distributed(train_all, how.tp, dropout, how, timeout=120)


@pytest.mark.parametrize("how", [how for how in HOW if how != "none"])
@pytest.mark.parametrize("recursion", RECURSIONS)
@pytest.mark.parametrize(("layout", "dropout"), [("tp1", 0.0), ("tp1", 0.1), ("tp2-sp", 0.1)])
def test_recompute_changes_no_gradient(layout: str, dropout: float, recursion: str, how: str) -> None:
    for rank in trained(dropout, layout):
        plain, recomputed = rank[recursion, "none"], rank[recursion, how]
        assert recomputed.metrics == plain.metrics
        assert worst_error(recomputed.gradients[0], plain.gradients[0])[0] <= 1e-6


def test_dropout_was_on() -> None:
    with_dropout, without = trained(0.1, "tp1")[0], trained(0.0, "tp1")[0]
    assert with_dropout["detach", "none"].metrics != without["detach", "none"].metrics


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
