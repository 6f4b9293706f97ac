"""Adapters beside frozen layers: the chain rule of dense weights, the same in every layout, in every family."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_recursive.plan.lora import TARGETS, LoRA
from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import Case, Layout, Training, build_model, build_wrapped, run_schedule, start_parallel, train
from tests.parameters import full_gradients, gathered, named_parameters
from tests.unit_tests.models.comparing import worst_error
from tests.unit_tests.pipeline.cases import ADAM, FULL, FULL_RECOMPUTE, OVERLAP
from tests.unit_tests.pipeline.test_ring import error_over_stages, metrics_error

LLAMA = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "num_query_groups": 2}
BASE = Case(FULL, transformer=LLAMA)


def adapted(case: Case, per_pass: bool = False, **knobs: Any) -> Case:
    lora = LoRA(**{"rank": 3, "alpha": 6.0, "targets": tuple(TARGETS), "per_pass": per_pass, "seed": 7, **knobs})
    return replace(case, transformer={**case.transformer, "lora": lora})


RECURRENT = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 3,
             "backprop_depth": 2, "injection": "concat"}  # fmt: skip
CASES = {
    "shared": adapted(replace(BASE, optimizer=ADAM, steps=2, evaluate=True)),
    "shared, detached, output norms": adapted(Case(transformer=LLAMA, norms={"norm_placement": "sandwich"})),
    "per pass": adapted(BASE, per_pass=True),
    "per pass, recurrent": adapted(Case(RECURRENT, transformer={**LLAMA, "num_layers": 4}), per_pass=True),
    "per pass, hierarchical, replayed": adapted(
        Case({"recursion_family": "hierarchical"}, transformer={**FULL_RECOMPUTE, "num_layers": 4}), per_pass=True),
    "plain, replayed": adapted(Case({"enable_recursive_refinement": False}, transformer=FULL_RECOMPUTE)),
}  # fmt: skip
TP_PP = Layout(tp=2, pp=2, sequence_parallel=True, phases="two")
LAYOUTS: dict[str, tuple[int, Layout, list[str]]] = {
    "tp2-sp": (2, Layout(tp=2, sequence_parallel=True), ["per pass, recurrent"]),
    "tp2-pp2-sp": (4, TP_PP, ["shared", "shared, detached, output norms", "per pass, hierarchical, replayed"]),
    "tp2-dp2": (4, Layout(tp=2, ddp=OVERLAP), ["shared", "per pass"]),
    "pp2-dp2": (4, Layout(pp=2, ddp={"overlap_grad_reduce": True, "bucket_size": 500}), ["per pass, recurrent"]),
    "dp2": (2, Layout(ddp=OVERLAP), ["shared"]),
}


def train_all(cases: list[str], layout: Layout) -> dict[str, Training]:
    return {case: train(CASES[case], layout) for case in cases}


@cache
def of_one_process(case: str) -> Training:
    found: Training = run_distributed(train_all, 1, [case], Layout(), timeout=120)[0][case]
    return found


@pytest.mark.parametrize("layout", grid(LAYOUTS, quick=["tp2-sp"]))
def test_every_gradient_of_an_adapter_is_that_of_one_process(layout: str) -> None:
    """And its trained weights: with sequence parallelism through the ring, in two phases, over replicas and buckets."""
    count, how, cases = LAYOUTS[layout]
    ranks = run_distributed(train_all, count, cases, how, timeout=240)
    for case in cases:
        found, expected = [rank[case] for rank in ranks], of_one_process(case)
        assert all(".lora." in name for name in expected.gradients[0]) and expected.gradients[0]
        for step, gradients in enumerate(expected.gradients):
            assert all(gradient.abs().max() > 0 for gradient in gradients.values()), case
            assert error_over_stages([rank.gradients[step] for rank in found], gradients)[0] <= 5e-6, case
        told = [rank for rank in found if rank.metrics[0]]
        assert all(metrics_error(rank.metrics, expected.metrics) <= 5e-6 for rank in told) and told
        for rank in found:
            assert rank.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)
            assert worst_error({**expected.parameters, **rank.parameters}, expected.parameters)[0] <= 1e-5


def chain_rule(case: Case, scale: float) -> tuple[float, str]:
    """With W' = W + s B A, dL/dA = s B^T dL/dW' and dL/dB = s dL/dW' A^T, where dL/dW' sums over all passes."""
    layout = Layout()
    wrapped = build_wrapped(case, layout)
    run_schedule(wrapped, case)
    found = full_gradients(wrapped)
    weights = {name: weight.detach().clone() for name, weight in named_parameters(wrapped).items()}
    dense = build_wrapped(replace(case, transformer={**case.transformer, "lora": None}), layout)
    factors = {}
    with torch.no_grad():
        for name, weight in named_parameters(dense).items():
            weight.copy_(weights[name])
            if matrix := re.fullmatch(r"(.*)\.(?:self_attention|mlp)\.(linear_\w+)\.weight", name):
                layer, path = matrix.groups()
                a, b = (weights[f"{layer}.lora.{path}.{each}_shared"] for each in "AB")
                factors[name] = layer, path, a, b
                weight += scale * b @ a
    run_schedule(dense, case)
    of_weight, expected = full_gradients(dense), {}
    for name, (layer, path, a, b) in factors.items():
        expected[f"{layer}.lora.{path}.A_shared"] = scale * b.T @ of_weight[name]
        expected[f"{layer}.lora.{path}.B_shared"] = scale * of_weight[name] @ a.T
    return worst_error(found, expected)


@pytest.mark.parametrize("case", ["shared", "shared, detached, output norms", "plain, replayed"])
def test_gradients_are_the_chain_rule_of_the_dense_ones(case: str) -> None:
    ((error, name),) = run_distributed(chain_rule, 1, CASES[case], 2.0)
    assert error <= 2e-5, name


def by_pass(case: Case, shared: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Gradients of a shared adapter, and of those of each pass that equal it; and with others, replayed or not."""
    wrapped = build_wrapped(shared, Layout())
    run_schedule(wrapped, shared)
    of_shared = full_gradients(wrapped)
    values = {name: weight.detach().clone() for name, weight in named_parameters(wrapped).items()}
    wrapped = build_wrapped(case, Layout())
    with torch.no_grad():
        for name, weight in named_parameters(wrapped).items():
            weight.copy_(values[name if ".lora." not in name else f"{name.rpartition('_')[0]}_shared"])
    run_schedule(wrapped, case)
    sums: dict[str, Tensor] = {}
    for name, gradient in full_gradients(wrapped).items():
        key = f"{name.rpartition('_')[0]}_shared"
        sums[key] = sums.get(key, 0) + gradient
    replays = ({}, FULL_RECOMPUTE)
    others = [train(replace(case, transformer={**case.transformer, **each}), Layout()).gradients[0] for each in replays]
    return of_shared, sums, others


def test_adapters_of_passes_get_their_own_parts_of_the_gradient() -> None:
    ((of_shared, sums, (recorded, replayed)),) = run_distributed(by_pass, 1, CASES["per pass"], CASES["shared"])
    assert worst_error(sums, of_shared)[0] <= 1e-5
    assert worst_error(replayed, recorded)[0] <= 1e-6
    passes = {name.rpartition("_")[2] for name in recorded}
    assert passes == {str(index) for index in range(6)}


def fresh(case: Case, layout: Layout) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float], int]:
    """The start of the adapters, the metrics with and without them, and the elements of DDP's buffers."""
    start_parallel(layout.tp, layout.pp)
    parameters, metrics, held = {}, [], 0
    for each in (case, replace(case, transformer={**case.transformer, "lora": None})):
        wrapped = build_wrapped(each, layout)
        own = build_model(each, layout, known_weights=False)
        with torch.no_grad():
            for name, weight in named_parameters(wrapped).items():
                if ".lora." in name:
                    weight.copy_(named_parameters(own)[name])
        if each is case:
            held = sum(buffer.numel for buffer in wrapped.buffers)
            local = {name: weight.detach() for name, weight in named_parameters(wrapped).items() if ".lora." in name}
            parameters = gathered(local, wrapped)
        metrics.append(run_schedule(wrapped, each))
    return parameters, metrics[0], metrics[1], held


@pytest.mark.parametrize("case", grid(["shared", "per pass, recurrent"], quick=["shared"]))
def test_a_fresh_adapter_changes_nothing_and_starts_the_same_in_every_layout(case: str) -> None:
    ((alone, with_it, without, held),) = run_distributed(fresh, 1, CASES[case], Layout())
    assert with_it == without  # bit by bit
    assert held == sum(weight.numel() for weight in alone.values())  # DDP has no bucket for what is frozen
    for name, weight in alone.items():
        assert not weight.any() if ".B_" in name else 0.9 < weight.abs().max() * weight.shape[1] ** 0.5 <= 1
    starts = {name: weight for name, weight in alone.items() if ".A_" in name}
    assert len({float(weight.flatten()[0]) for weight in starts.values()}) == len(starts)
    for rank in run_distributed(fresh, 2, CASES[case], Layout(pp=2) if case == "shared" else Layout(tp=2)):
        assert rank[0] and all(torch.equal(weight, alone[name]) for name, weight in rank[0].items())
