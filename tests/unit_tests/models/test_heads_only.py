"""Heads alone, on frozen weights: they learn as beside all other weights, and nothing else moves, in any layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_recursive.errors import UserError
from megatron_recursive.losses.exit_gate import improvement_loss
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import Case, Layout, Training, build_wrapped, train
from tests.parameters import gathered, named_parameters
from tests.unit_tests.models.comparing import worst_error
from tests.unit_tests.pipeline.cases import FULL, OVERLAP, PER_TOKEN

HEADS = {"halting_head.weight", "halting_head.bias"}
GATE = {"exit_gate.weight", "exit_gate.bias"}
GATED = {"looped, exit gate", "two loops, exit gate"}
CASES = {
    "detached": Case(),
    "full, five micro-batches": Case(FULL, transformer=PER_TOKEN, micro_batches=5),
    "last block, norm once": Case({"halt_supervision": "last", "state_norm": "none", **FULL}),
    "looped": Case({"recursion_family": "looped", "halt_target": "agrees-with-last"}),
    "looped, exit gate": Case({"recursion_family": "looped", "num_refinement_blocks": 4, "exit_gate": True,
                               "state_norm": "none"}),
    "two loops, exit gate": Case({"recursion_family": "looped", "exit_gate": True}),
    "hierarchical": Case({"recursion_family": "hierarchical"}, model={"share_embeddings_and_output_weights": False}),
}
ADAM = {"lr": 1e-1, "weight_decay": 0.1}
LAYOUTS = {
    "one process": (1, Layout()),
    "pp2": (2, Layout(pp=2)),
    "tp2-sp": (2, Layout(tp=2, sequence_parallel=True)),
    "pp2-two-phases-replayed": (2, Layout(pp=2, phases="two", recompute_passes=True)),
    "pp2-tp2": (4, Layout(tp=2, pp=2)),
    "pp2-dp2-distributed": (4, Layout(pp=2, ddp=OVERLAP)),
}


def heads_only(case: Case) -> Case:
    return replace(case, plan=build_plan(case.resolved_recursion()).heads_only())


def gradients(layout: Layout, alone: bool) -> dict[str, Training]:
    """A gate alone has another loss than beside all weights."""
    return {name: train(heads_only(case) if alone or name in GATED else case, layout) for name, case in CASES.items()}


@cache
def in_one_process() -> dict[str, Training]:
    """Beside all other weights."""
    return run_distributed(gradients, 1, Layout(), False, timeout=120)[0]


def test_a_gate_learns_where_a_loop_was_worth_it() -> None:
    """Ouro's second stage, token by token."""
    losses, logits = torch.rand(4, 3, 5).unbind(), torch.randn(4, 3, 5).unbind()
    expected = torch.zeros(3, 5)
    for loop in range(1, 4):
        gain = (losses[loop - 1] - losses[loop]).clamp(min=0)
        worth, leaves = 1 / (1 + torch.exp(-50 * (gain - 0.005))), 1 / (1 + torch.exp(-logits[loop]))
        expected -= (worth * torch.log(1 - leaves) + (1 - worth) * torch.log(leaves)) / 4
    torch.testing.assert_close(improvement_loss(losses, logits), expected)


@pytest.mark.parametrize("layout", grid(LAYOUTS, quick=["one process", "pp2"]))
def test_heads_get_their_gradients_and_no_other_weight_has_one(layout: str) -> None:
    ranks, how = LAYOUTS[layout]
    found = run_distributed(gradients, ranks, how, True, timeout=120, rendezvous=30.0)
    for name, expected in in_one_process().items():
        heads = GATE if name in GATED else HEADS
        kept = {each: expected.gradients[0][each] for each in heads}
        assert any(weight.abs().max() > 0 for weight in kept.values())
        for rank in found:
            (mine,), (told,) = rank[name].gradients, rank[name].metrics
            assert set(mine) == (heads if told else set())
            assert worst_error({**kept, **mine}, kept)[0] <= (5e-6 if how.tp > 1 else 1e-6), name
        (metrics,) = expected.metrics
        total = metrics["gate loss" if name in GATED else "halt loss"]
        assert {**metrics, "total loss": total} == pytest.approx(told, rel=1e-5)


def trained(layout: Layout) -> tuple[list[float], list[str], list[float]]:
    """The halting loss by step, the weights that have moved, and the gradient's norm by step."""
    case = heads_only(replace(CASES["full, five micro-batches"], optimizer=ADAM, steps=12))
    fresh = build_wrapped(case, layout)
    before = gathered({name: weight.data for name, weight in named_parameters(fresh).items()}, fresh)
    result = train(case, layout)
    moved = [name for name, weight in result.parameters.items() if not torch.equal(weight, before[name])]
    return [step.get("halt loss", 0.0) for step in result.metrics], moved, result.gradient_norms


@pytest.mark.parametrize("layout", grid(["pp2", "pp2-dp2-distributed"], quick=[]))
def test_the_loss_falls_and_frozen_weights_stay(layout: str) -> None:
    ranks, how = LAYOUTS[layout]
    found = run_distributed(trained, ranks, how, timeout=120, rendezvous=30.0)
    for losses, moved, norms in found:
        assert set(moved) == (HEADS if losses[0] else set()) and norms == found[0][2] and norms[0] > 0
    assert found[-1][0][-1] < 0.9 * found[-1][0][0]


KNOBS = {"halting": {"halt_loss_weight": 0.0}, "recurrent": {"recursion_family": "recurrent"},
         "plain": {"enable_recursive_refinement": False}}  # fmt: skip


@pytest.mark.parametrize("why", KNOBS)
def test_a_plan_without_heads_says_what_they_need(why: str) -> None:
    plan = build_plan(RecursionConfig(**KNOBS[why]).resolved(embedding_init_std=1.0))
    with pytest.raises(UserError, match="of which this model has none; a halting head needs .*--halt-loss-weight"):
        plan.heads_only()


def test_the_plan_of_heads_alone_is_a_plan() -> None:
    plan = build_plan(RecursionConfig().resolved(embedding_init_std=1.0)).heads_only()
    assert plan.trains_heads_only and RecursionPlan.from_json(plan.to_json()) == plan
    assert not any(plan.gradient_groups(tied_embeddings=True)[each] for each in ("embedding", "layers", "output head"))
    assert plan.with_blocks(5).trains_heads_only and "yes" not in plan.describe()
