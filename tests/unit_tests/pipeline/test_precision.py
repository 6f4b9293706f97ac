"""The ring under dropout, whose masks differ from the unpipelined model's, and in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import Case, Layout, Training, train
from tests.unit_tests.models.comparing import worst_error
from tests.unit_tests.pipeline.cases import FULL, FULL_RECOMPUTE, SELECTIVE_RECOMPUTE, SUPERVISED_HALTING
from tests.unit_tests.pipeline.test_ring import error_over_stages, last_stage, metrics_error

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "detach": {},
    "full": {"recursion": FULL},
    "supervised": {"plan": SUPERVISED_HALTING},
    "recurrent": {"recursion": {
        "recursion_family": "recurrent", "num_recurrences": 3, "backprop_depth": 2, "injection": "concat",
        "state_init": "sampled", "state_norm": "core-end"}},
    "gate": {"recursion": {"recursion_family": "looped", "num_refinement_blocks": 3, "exit_gate": True}},
    "hierarchical": {"recursion": {"recursion_family": "hierarchical", "latent_backprop_depth": "1"}},
    "from the input": {"recursion": {"recursion_family": "recurrent", "num_recurrences": 3, "injection": "add"}},
    "boundary gate": {"recursion": {
        "recursion_family": "recurrent", "num_recurrences": 3, "backprop_depth": 2, "injection": "add",
        "recurrence_step": "mean", "boundary": "gate"}},
}
PP2, PASSES = Layout(pp=2), Layout(pp=2, recompute_passes=True)
Variants = dict[str, tuple[dict[str, Any], Layout]]
RECOMPUTES: Variants = {
    "none": (DROPOUT, PP2),
    "full": ({**DROPOUT, **FULL_RECOMPUTE}, PP2),
    "selective": ({**DROPOUT, **SELECTIVE_RECOMPUTE}, PP2),
    "passes": (DROPOUT, PASSES),
    "passes-and-layers": ({**DROPOUT, **FULL_RECOMPUTE}, PASSES),
}


PAIRS = [(kind, how) for kind in KINDS for how in RECOMPUTES if how != "none"]


def train_each(variants: Variants, kinds: Sequence[str] = tuple(KINDS)) -> dict[tuple[str, str], Training]:
    return {
        (kind, name): train(Case(**KINDS[kind], transformer=transformer), layout)
        for kind in kinds
        for name, (transformer, layout) in variants.items()
    }


@cache
def with_dropout(kind: str, how: str) -> list[dict[tuple[str, str], Training]]:
    return run_distributed(train_each, 2, {how: RECOMPUTES[how]}, [kind])


@pytest.mark.parametrize(("kind", "how"), grid(PAIRS, quick=[("full", "passes-and-layers")]))
def test_recompute_repeats_the_dropout_masks(kind: str, how: str) -> None:
    """At one seed, recompute changes no gradient."""
    for one, other in zip(with_dropout(kind, "none"), with_dropout(kind, how), strict=True):
        rank = one | other
        plain, recomputed = rank[kind, "none"], rank[kind, how]
        assert recomputed.metrics == plain.metrics
        assert worst_error(recomputed.gradients[0], plain.gradients[0])[0] <= 1e-6


def dropping_on_four(sequence_parallel: bool) -> dict[str, Training]:
    layout = Layout(tp=2, pp=2, sequence_parallel=sequence_parallel)
    replayed = replace(layout, recompute_passes=True)
    found = {"plain": train(Case(FULL, transformer=DROPOUT), layout)}
    found["recomputed"] = train(Case(FULL, transformer={**DROPOUT, **FULL_RECOMPUTE}), replayed)
    return {**found, "without": train(Case(FULL), layout)}


@pytest.mark.parametrize("sequence_parallel", grid([False, True], quick=[]))
def test_dropout_on_two_stages_of_two_tensor_parallel_ranks(sequence_parallel: bool) -> None:
    """The two ranks of a stage drop the same hidden features (where they hold the same tokens), so that what both hold
    keeps one gradient, bit for bit; and a replay repeats their masks, those of attention too, which differ by rank."""
    ranks = run_distributed(dropping_on_four, 4, sequence_parallel)
    assert last_stage([rank["plain"] for rank in ranks])[0].metrics != ranks[-1]["without"].metrics, "dropout was on"
    for one, other in ((ranks[0], ranks[1]), (ranks[2], ranks[3])):
        assert one["plain"].metrics == other["plain"].metrics
        theirs = other["plain"].gradients[0]
        assert [name for name, mine in one["plain"].gradients[0].items() if not torch.equal(mine, theirs[name])] == []
    for rank in ranks:
        assert rank["recomputed"].metrics == rank["plain"].metrics
        assert worst_error(rank["recomputed"].gradients[0], rank["plain"].gradients[0])[0] <= 1e-6


@cache
def precisions(stages: int) -> list[dict[tuple[str, str], Training]]:
    layout = Layout(pp=stages)
    return run_distributed(train_each, stages, {"bf16": ({"bf16": True}, layout), "fp32": ({}, layout)}, timeout=120)


@pytest.mark.parametrize("kind", grid(KINDS, quick=["full"]))
def test_dropout_was_on(kind: str) -> None:
    assert with_dropout(kind, "none")[1][kind, "none"].metrics != precisions(2)[1][kind, "fp32"].metrics


@pytest.mark.parametrize("kind", grid(KINDS, quick=["full"]))
def test_bf16_losses(kind: str) -> None:
    """The forward pass does the same operations in the same order, so that nothing but the reports' sums may differ."""
    expected = precisions(1)[0][kind, "bf16"].metrics
    for rank in last_stage([rank[kind, "bf16"] for rank in precisions(2)]):
        assert metrics_error(rank.metrics, expected) <= 1e-6


@pytest.mark.parametrize("kind", grid(KINDS, quick=["full"]))
def test_bf16_gradients(kind: str) -> None:
    """Nor in the backward pass: each use of a weight reaches ``main_grad`` in fp32 by itself on one stage too. Seen are
    1e-8, against 2e-2 between bf16 and fp32, and 4e-3 to 6e-3 where one stage sums the uses in bf16."""
    half = precisions(1)[0][kind, "bf16"].gradients[0]
    mine = [rank[kind, "bf16"].gradients[0] for rank in precisions(2)]
    assert error_over_stages(mine, half)[0] <= 1e-6
