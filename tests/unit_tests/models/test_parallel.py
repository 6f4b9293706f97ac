"""A parallel run is the serial run reached another way: losses, metrics, all gradients, norms and trained weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from tests.distributed import run_distributed
from tests.grids import chosen, grid
from tests.models import Case, Layout, Training, build_optimizer, build_wrapped, run_schedule, train
from tests.unit_tests.models.comparing import worst_error

# The clipping is active: the norms are above 0.1 from the first step on. Adam's epsilon lies between the clipped
# gradients (about 1e-3) and their rounding errors (1e-9): with 1e-8, Adam would make full steps out of the latter where
# a gradient is zero in theory (the keys' part of the QKV bias), and weights would part by 1e-4.
ADAM = {"lr": 1e-2, "clip_grad": 0.1, "weight_decay": 0.01, "adam_eps": 1e-5}
FULL = {"detach_between_refinements": False}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

CASES: dict[str, Case] = {
    "detach": Case(optimizer=ADAM, steps=2),
    "full": Case(recursion=FULL, optimizer=ADAM, steps=2),
    "trunc-normal-none-untied": Case(
        recursion={"state_init": "trunc-normal", "state_norm": "none"},
        model={"share_embeddings_and_output_weights": False},
        optimizer=ADAM,
        steps=2,
    ),
    "halting-last": Case(recursion={"halt_supervision": "last", "halt_target": "agrees-with-last"}, micro_batches=2),
    "agrees-with-last": Case(
        recursion={"halt_target": "agrees-with-last", "num_refinement_blocks": 3}, micro_batches=2
    ),
    "no-halting-none": Case(recursion={"halt_loss_weight": 0.0, "state_norm": "none", **FULL}, micro_batches=2),
    "llama-like": Case(
        recursion=FULL,
        transformer={"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "num_query_groups": 2},
        model={"share_embeddings_and_output_weights": False},
        micro_batches=2,
    ),
    "qk-norm": Case(transformer={"qk_layernorm": True, "num_query_groups": 2}, micro_batches=2),
    "zero-centered-learned": Case(
        transformer={"layernorm_zero_centered_gamma": True},
        model={"position_embedding_type": "learned_absolute"},
        micro_batches=2,
    ),
    "documents": Case(documents=True, micro_batches=2),
    "per-token-loss": Case(transformer={"calculate_per_token_loss": True}, optimizer=ADAM, steps=2),
    "recompute": Case(transformer=RECOMPUTE, recursion=FULL, micro_batches=2),
}

OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, Layout]] = {
    "tp2": (2, Layout(tp=2)),
    "tp2-sp": (2, Layout(tp=2, sequence_parallel=True)),
    "dp2": (2, Layout()),
    "dp2-overlap-grad-reduce": (2, Layout(ddp={"overlap_grad_reduce": True, "bucket_size": 2000})),
    "dp2-distributed-optimizer": (2, Layout(ddp={**OVERLAP, "bucket_size": 2000})),
    "tp2-sp-dp2": (4, Layout(tp=2, sequence_parallel=True, ddp={**OVERLAP, "bucket_size": 2000})),
}
# Under sequence parallelism every case, since it shards what tensor parallelism does not. Data parallelism sees of a
# model its gradients, when they come, and its counts.
ASKED: dict[str, list[str]] = {
    "tp2": ["trunc-normal-none-untied", "agrees-with-last", "qk-norm"],
    "tp2-sp": [*CASES],
    "dp2": ["full", "halting-last", "agrees-with-last", "per-token-loss"],
    "dp2-overlap-grad-reduce": ["detach", "trunc-normal-none-untied", "recompute"],
    "dp2-distributed-optimizer": [
        "detach", "full", "trunc-normal-none-untied", "per-token-loss", "no-halting-none", "recompute",
    ],
    "tp2-sp-dp2": ["detach", "qk-norm"],  # four processes take turns on a small machine
}  # fmt: skip
PAIRS = [(layout, case) for layout, cases in ASKED.items() for case in cases]
TRAINED = [pair for pair in PAIRS if CASES[pair[1]].optimizer]
QUICK = [("tp2-sp", "detach"), ("tp2-sp", "trunc-normal-none-untied"), ("dp2-overlap-grad-reduce", "recompute"),
         ("dp2-distributed-optimizer", "full")]  # fmt: skip
Serial, Parallel = dict[str, Training], Callable[[str], list[dict[str, Training]]]


def train_all(cases: dict[str, Case], layout: Layout) -> dict[str, Training]:
    return {name: train(case, layout) for name, case in cases.items()}


@pytest.fixture(scope="module")
def serial(request: pytest.FixtureRequest) -> Serial:
    names = dict.fromkeys(case for _, case in chosen(request, "layout", "case"))
    cases = {name: replace(CASES[name], masked=True) for name in names}  # documents by a mask of S x S
    return run_distributed(train_all, 1, cases, Layout(), timeout=120)[0]


@pytest.fixture(scope="module")
def parallel(request: pytest.FixtureRequest) -> Parallel:
    """Every rank's view, by layout: what is replicated must be right on each."""
    pairs = chosen(request, "layout", "case")

    @cache
    def of(layout: str) -> list[dict[str, Training]]:
        ranks, how = LAYOUTS[layout]
        cases = {case: CASES[case] for asked, case in pairs if asked == layout}
        return run_distributed(train_all, ranks, cases, how, timeout=180)

    return of


@pytest.mark.parametrize(("layout", "case"), grid(PAIRS, QUICK))
def test_losses_and_metrics(serial: Serial, parallel: Parallel, layout: str, case: str) -> None:
    for rank in parallel(layout):
        for mine, theirs in zip(rank[case].metrics, serial[case].metrics, strict=True):
            assert mine == pytest.approx(theirs, rel=5e-6, abs=1e-6)


@pytest.mark.parametrize(("layout", "case"), grid(PAIRS, QUICK))
def test_all_gradients(serial: Serial, parallel: Parallel, layout: str, case: str) -> None:
    for rank in parallel(layout):
        for mine, theirs in zip(rank[case].gradients, serial[case].gradients, strict=True):
            assert worst_error(mine, theirs)[0] <= 1e-5


@pytest.mark.parametrize(("layout", "case"), grid(TRAINED, QUICK))
def test_gradient_norm_and_trained_parameters(serial: Serial, parallel: Parallel, layout: str, case: str) -> None:
    expected = serial[case]
    assert len(expected.gradient_norms) > 1 and min(expected.gradient_norms) > ADAM["clip_grad"]
    for rank in parallel(layout):
        assert rank[case].gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)
        assert worst_error(rank[case].parameters, expected.parameters)[0] <= 1e-5


def steps_around_an_evaluation(case: Case, layout: Layout) -> tuple[list[dict[str, float]], list[str]]:
    """Train, train, evaluate, train; and the parameters whose gradient DDP never saw."""
    wrapped = build_wrapped(case, layout)
    optimizer = build_optimizer(case, layout, wrapped)
    metrics = []
    for step, forward_only in enumerate((False, False, True, False)):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        metrics.append(run_schedule(wrapped, case, step, forward_only=forward_only))
        if not forward_only:
            optimizer.step()
    seen: set[object] = set()
    for group in wrapped.bucket_groups:
        seen |= group.register_grad_ready.ready
    return metrics, [name for name, p in wrapped.module.named_parameters() if p not in seen]


@pytest.mark.parametrize("case", grid(["detach", "full", "trunc-normal-none-untied"], quick=["full"]))
def test_an_evaluation_between_overlapped_steps(case: str) -> None:
    expected, _ = run_distributed(steps_around_an_evaluation, 1, CASES[case], Layout())[0]
    how = LAYOUTS["dp2-distributed-optimizer"][1]
    for metrics, starved in run_distributed(steps_around_an_evaluation, 2, CASES[case], how):
        assert starved == []
        assert all(name in metrics[2] for name in ("lm loss block 1", "lm loss block 2"))
        for mine, theirs in zip(metrics, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
