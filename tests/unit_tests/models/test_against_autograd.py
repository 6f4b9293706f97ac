"""The model against a second writing of the recursion: a plain loop, torch's own losses, ``torch.autograd.grad``.

Nothing of the plan, of ``run_plan`` or of the package's losses is used by the reference; it takes Megatron's embedding
and layers, and the weights of the heads, from the model under test.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_recursive.plan import DecoderPass, RecursionPlan
from tests.distributed import run_distributed
from tests.models import SEQ, Case, Layout, build_wrapped, full_gradients, make_batches, run_schedule
from tests.unit_tests.models.comparing import worst_error

FULL = {"detach_between_refinements": False}
UNTIED = {"share_embeddings_and_output_weights": False}


def per_block_plan(
    blocks: int, latents: int, lm_weights: list[float], halt_weights: list[float], norm: str = "final"
) -> RecursionPlan:
    """Deep supervision: every block is supervised, carries gradient, and starts from cut states."""
    passes: list[DecoderPass] = []
    for block in range(blocks):
        for step in range(latents + 1):
            ends = step == latents
            passes.append(DecoderPass(
                index=len(passes), block=block, target="output" if ends else "latent",
                reads=("output", "latent") if ends else ("output", "latent", "input"), grad=True,
                cuts_states=step == 0 and block > 0, supervised_weight=lm_weights[block] if ends else 0.0,
                halt_weight=halt_weights[block] if ends else 0.0,
            ))  # fmt: skip
    return RecursionPlan("core", tuple(passes), state_norm=norm, embedding_multiplier=3.0)


CASES: dict[str, Case] = {
    "detach": Case(),
    "full": Case(recursion=FULL),
    "detach-untied": Case(model=UNTIED),
    "full-untied": Case(recursion=FULL, model=UNTIED),
    "halting-last": Case(recursion={"halt_supervision": "last", "num_refinement_blocks": 3}),
    "halting-last-full": Case(recursion={"halt_supervision": "last", **FULL}),
    "agrees-with-last": Case(recursion={"halt_target": "agrees-with-last", "num_refinement_blocks": 3}),
    "agrees-with-last-full": Case(recursion={"halt_target": "agrees-with-last", "halt_loss_weight": 0.3, **FULL}),
    "no-halting": Case(recursion={"halt_loss_weight": 0.0}),
    "trunc-normal": Case(recursion={"state_init": "trunc-normal", **FULL}),
    "trunc-normal-detach": Case(recursion={"state_init": "trunc-normal", "num_latent_refinements": 1}),
    "state-norm-none": Case(recursion={"state_norm": "none", **FULL}),
    "state-norm-none-detach": Case(recursion={"state_norm": "none", "num_refinement_blocks": 3}, model=UNTIED),
    "state-norm-none-trunc-normal": Case(recursion={"state_norm": "none", "state_init": "trunc-normal"}),
    "embedding-multiplier": Case(recursion={"embedding_multiplier": 2.5, **FULL}),
    "one-block-one-latent": Case(recursion={"num_refinement_blocks": 1, "num_latent_refinements": 1}),
    "learned-positions": Case(recursion=FULL, model={"position_embedding_type": "learned_absolute"}),
    "per-block": Case(plan=per_block_plan(3, 2, [0.3, 0.5, 0.7], [1 / 3] * 3)),
    "per-block-untied-no-halting": Case(plan=per_block_plan(3, 1, [0.3, 0.5, 0.7], [0.0] * 3), model=UNTIED),
    "per-block-norm-none": Case(plan=per_block_plan(2, 1, [0.5, 1.0], [0.2, 0.8], norm="none")),
    "per-token-loss": Case(transformer={"calculate_per_token_loss": True}),
}


@dataclass(frozen=True)
class Recipe:
    """What the reference needs to know, in plain words."""

    blocks: int
    latents: int
    detached: bool
    lm_weights: list[float]
    halt_weights: list[float]
    cut: bool
    norm_once: bool
    multiplier: float
    halt_loss_weight: float
    agrees: bool


def recipe(case: Case) -> Recipe:
    knobs = case.resolved_recursion()
    blocks, plan = knobs.num_refinement_blocks, case.plan
    all_blocks = knobs.halt_supervision == "all"
    if plan is not None:  # the per-block cases
        ends = [p for p in plan.passes if p.target == "output"]
        return Recipe(
            len(ends), len(plan.passes) // len(ends) - 1, False, [p.supervised_weight for p in ends],
            [p.halt_weight for p in ends], True, plan.state_norm == "none", plan.embedding_multiplier, 1.0, False,
        )  # fmt: skip
    return Recipe(
        blocks, knobs.num_latent_refinements, knobs.detach_between_refinements,
        [0.0] * (blocks - 1) + [1.0],
        ([1 / blocks] * blocks if all_blocks else [0.0] * (blocks - 1) + [1.0])
        if knobs.halt_loss_weight else [0.0] * blocks,
        False, knobs.state_norm == "none", float(knobs.embedding_multiplier or 0), knobs.halt_loss_weight,
        knobs.halt_target == "agrees-with-last",
    )  # fmt: skip


def reference_states(model: Any, batch: dict[str, Tensor], how: Recipe) -> list[Tensor]:
    """The output state after every block, [S, B, H]."""
    rotary = model.rotary_pos_emb(SEQ) if hasattr(model, "rotary_pos_emb") else None

    def decoder(hidden: Tensor) -> Tensor:
        return model.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)

    x = model.embedding(input_ids=batch["input_ids"], position_ids=batch["position_ids"]) * how.multiplier
    output = latent = torch.zeros_like(x)
    if hasattr(model, "initial_output"):
        output, latent = torch.zeros_like(x) + model.initial_output, torch.zeros_like(x) + model.initial_latent
    states = []
    for block in range(how.blocks):
        if block and (how.detached or how.cut):
            output, latent = output.detach(), latent.detach()
        for _ in range(how.latents):
            latent = decoder(output + latent + x)
        output = decoder(output + latent)
        states.append(output)
    return states


def reference_losses(model: Any, batch: dict[str, Tensor], how: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective [B, S], and everything that is reported, each [B, S]."""
    head = model.embedding.word_embeddings.weight if model.share_embeddings_and_output_weights else None
    head = model.output_layer.weight if head is None else head
    labels = batch["labels"]
    logits, halting = [], []
    for state, weight in zip(reference_states(model, batch, how), how.lm_weights, strict=True):
        hidden = (state if weight else state.detach()).transpose(0, 1)
        if how.norm_once:
            norm = model.output_norm
            scale, shift = (norm.weight, norm.bias) if weight else (norm.weight.detach(), norm.bias.detach())
            hidden = F.layer_norm(hidden, hidden.shape[-1:], scale, shift, 1e-5)
        logits.append(hidden @ head.T)
        if any(how.halt_weights):
            asked = hidden if len(logits) == how.blocks else hidden.detach()  # earlier blocks do not learn from halting
            halting.append(asked @ model.halting_head.weight + model.halting_head.bias)
    lm = [F.cross_entropy(each.transpose(1, 2), labels, reduction="none") for each in logits]
    objective = sum(weight * loss for weight, loss in zip(how.lm_weights, lm, strict=True))
    report = {"lm loss": lm[-1]}
    for block, loss in enumerate(lm):
        if how.blocks > 1 and (how.lm_weights[block] or how.halt_weights[block]):  # others are not projected
            report[f"lm loss block {block + 1}"] = loss
    if halting:
        goal = logits[-1].argmax(-1) if how.agrees else labels
        bce = [F.binary_cross_entropy_with_logits(q, (z.argmax(-1) == goal).float(), reduction="none")
               for q, z in zip(halting, logits, strict=True)]  # fmt: skip
        report["halt loss"] = sum(weight * loss for weight, loss in zip(how.halt_weights, bce, strict=True))
        objective = objective + how.halt_loss_weight * report["halt loss"]
        report["mean halting probability"] = sum(torch.sigmoid(q) for q in halting) / how.blocks
        report["expected refinement steps"] = first_halt(halting)
    return objective, report | {"total loss": objective}


def first_halt(halting: list[Tensor]) -> Tensor:
    """Token by token, the first block whose probability reaches 0.5."""
    steps = torch.full_like(halting[0], float(len(halting)))
    for place in torch.cartesian_prod(*(torch.arange(n) for n in steps.shape)).tolist():
        for block, q in enumerate(halting):
            if 1 / (1 + torch.exp(-q[tuple(place)])) >= 0.5:
                steps[tuple(place)] = block + 1
                break
    return steps


def compare(case: Case) -> tuple[tuple[float, str], dict[str, float], dict[str, float]]:
    wrapped = build_wrapped(case, Layout())
    model, how = wrapped.module, recipe(case)
    metrics = run_schedule(wrapped, case)
    per_token = model.config.calculate_per_token_loss
    total, tokens = torch.zeros(()), 0.0
    sums: dict[str, float] = defaultdict(float)
    for batch in make_batches(case, 0):
        mask = batch["loss_mask"]
        objective, report = reference_losses(model, batch, how)
        total = total + (objective * mask).sum() / (1.0 if per_token else mask.sum() * case.micro_batches)
        tokens += float(mask.sum())
        for name, value in report.items():
            sums[name] += float((value.detach() * mask).sum())
    total = total / tokens if per_token else total
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(total, list(model.parameters()))
    error = worst_error(full_gradients(wrapped), dict(zip(names, gradients, strict=True)))
    return error, metrics, {name: value / tokens for name, value in sums.items()}


def compare_all(cases: dict[str, Case]) -> dict[str, Any]:
    return {name: compare(case) for name, case in cases.items()}


@cache
def compared() -> dict[str, Any]:
    return run_distributed(compare_all, 1, CASES, timeout=120)[0]


@pytest.mark.parametrize("case", CASES)
def test_all_gradients(case: str) -> None:
    (error, name), _, _ = compared()[case]
    assert error <= 2e-6, name


@pytest.mark.parametrize("case", CASES)
def test_losses_and_metrics(case: str) -> None:
    _, metrics, expected = compared()[case]
    telemetry = {name for name in metrics if name.startswith(("output change", "token cosine"))}
    assert set(metrics) - telemetry == set(expected)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=2e-6)
