"""Every option of the layers trains under recursion, feeds every parameter, and stores what a plain GPT stores."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.models import Case, Layout, build_model, named_parameters, start_parallel, train
from tests.unit_tests.models.options import OPTIONS

ADAM = {"lr": 1e-2, "clip_grad": 1.0}


def train_options() -> dict[str, Any]:
    results = {}
    for name, option in OPTIONS.items():
        case = replace(option, micro_batches=2, optimizer=ADAM, steps=2)
        results[name] = train(case, Layout())
    return results


@cache
def trained() -> dict[str, Any]:
    return run_distributed(train_options, 1, timeout=120)[0]


@pytest.mark.parametrize("option", OPTIONS)
def test_option_trains_and_every_parameter_gets_a_gradient(option: str) -> None:
    training = trained()[option]
    for gradients in training.gradients:
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        assert [name for name, gradient in gradients.items() if not gradient.abs().max() > 0] == []
    assert all(torch.isfinite(value).all() for value in training.parameters.values())
    losses = [metrics["lm loss"] for metrics in training.metrics]
    assert all(0 < loss < 20 for loss in losses)


def initial_values() -> dict[str, Any]:
    start_parallel()
    default = build_model(Case(), known_weights=False)
    one = build_model(Case(recursion={"state_init": "trunc-normal"}), known_weights=False)
    torch.manual_seed(99)
    other = build_model(Case(recursion={"state_init": "trunc-normal", "halt_bias": -1.0}), known_weights=False)
    return {
        "halting": [m.halting_head.state_dict() for m in (default, other)],
        "states": [dict(m.named_buffers()) for m in (default, one, other)],
        "parameters": list(named_parameters(one)),
    }


def test_initial_values_of_what_recursion_adds() -> None:
    """The halting head starts at weight 0 and its bias; initial states belong to the function and not to the run."""
    values = run_distributed(initial_values, 1)[0]
    for head, bias in zip(values["halting"], (-5.0, -1.0), strict=True):
        assert not head["weight"].any() and head["bias"].item() == bias
    none, one, other = values["states"]
    assert none == {}
    assert set(one) == {"initial_output", "initial_latent"} and not set(one) & set(values["parameters"])
    for name, vector in one.items():
        assert torch.equal(vector, other[name])
        assert vector.abs().max() <= 2 and 0.6 < vector.std() < 1.1
    assert not torch.equal(one["initial_output"], one["initial_latent"])
