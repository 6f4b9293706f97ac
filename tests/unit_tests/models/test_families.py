"""Each family against its paper's formula in plain torch, in one process and spread over ranks: losses, all gradients.

The references take Megatron's embedding, layers and heads from the model under test, and nothing of the plan.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_recursive.plan.added_parameters import EVERY, sampled_start, tokens_so_far
from tests.distributed import run_distributed
from tests.grids import grid
from tests.models import (
    SEQ,
    Case,
    Layout,
    Training,
    build_model,
    build_wrapped,
    full_gradients,
    make_batches,
    run_schedule,
    start_parallel,
    train,
)
from tests.unit_tests.models.comparing import worst_error

HUGINN = {"norm_placement": "sandwich", "output_norm_scope": "residual"}
BIASED = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "add_qkv_bias": True}
UNTIED = {"share_embeddings_and_output_weights": False}
FOUR, SIX = {"num_layers": 4}, {"num_layers": 6}
DEEP = {"enable_deep_supervision": True}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def recurrent(prelude: int, coda: int, **knobs: Any) -> dict[str, Any]:
    return {"recursion_family": "recurrent", "num_prelude_layers": prelude, "num_coda_layers": coda, **knobs}


CASES = {
    "recurrent": Case(recurrent(1, 1, num_recurrences=3, injection="add"), transformer=FOUR),
    "recurrent-mean": Case(recurrent(1, 1, num_recurrences=4, recurrence_step="mean"), transformer=FOUR, model=UNTIED),
    "recurrent-part-window": Case(
        recurrent(2, 0, num_recurrences=4, recurrence_step="0.3", backprop_depth=2, injection="add"), transformer=SIX
    ),
    "recurrent-free-passes": Case(
        recurrent(0, 1, num_recurrences=6, recurrence_step="0.3", backprop_depth=2, injection="add"), transformer=FOUR
    ),
    "recurrent-bare-window": Case(
        recurrent(0, 0, num_recurrences=6, backprop_depth=2, injection="add"), transformer=FOUR
    ),
    "recurrent-bare": Case(recurrent(0, 0, num_recurrences=3, recurrence_step="mean"), transformer=FOUR),
    "recurrent-window": Case(
        recurrent(1, 2, num_recurrences=3, backprop_depth=1, injection="add"), transformer={**SIX, **FULL_RECOMPUTE},
        model=UNTIED,
    ),
    "huginn": Case(
        recurrent(1, 1, num_recurrences=2, injection="concat", state_init="sampled", state_norm="core-end",
                  backprop_depth=1), transformer={**FOUR, **BIASED}, norms=HUGINN,
    ),
    "parcae": Case(
        recurrent(2, 0, num_recurrences=4, injection="diagonal", state_init="sampled", state_std=0.1, backprop_depth=3),
        transformer=SIX, model=UNTIED,
    ),
    "norm-in-core": Case(
        recurrent(0, 1, num_recurrences=3, injection="concat", state_norm="core", recurrence_step="0.6"),
        transformer={**FOUR, **FULL_RECOMPUTE},
    ),
    "gate": Case(recurrent(1, 1, num_recurrences=3, recurrence_step="mean", boundary="gate"), transformer=FOUR),
    "gate-window": Case(
        recurrent(0, 1, num_recurrences=4, injection="add", backprop_depth=2, boundary="gate"), transformer=FOUR,
        model=UNTIED, evaluate=True,
    ),
    "gate-core": Case({"boundary": "gate", "num_latent_refinements": 3}, transformer=FOUR),
    "gate-hierarchical": Case(
        {"recursion_family": "hierarchical", "boundary": "gate", "num_latent_refinements": 3,
         "latent_backprop_depth": "2", "state_init": "trunc-normal"}, transformer=FOUR,
    ),
    "norm-inject": Case(recurrent(1, 1, num_recurrences=3, boundary="norm-inject"), transformer=FOUR),
    "norm-inject-window": Case(  # the input gets its gradient where states move, and nowhere else
        recurrent(0, 1, num_recurrences=4, backprop_depth=2, boundary="norm-inject"),
        transformer={**FOUR, **FULL_RECOMPUTE}, model=UNTIED,
    ),
    # A prelude and a coda that the first and the last of two and of four stages hold alone; the last is one trip.
    "recurrent-folded": Case(
        recurrent(1, 1, num_recurrences=4, backprop_depth=2, injection="add"), transformer=FOUR, model=UNTIED,
        evaluate=True,
    ),
    "recurrent-folded-phases": Case(
        recurrent(0, 1, num_recurrences=4, backprop_depth=2, injection="add"), transformer=FOUR
    ),
    "recurrent-once": Case(recurrent(1, 1, num_recurrences=1, injection="add"), transformer=FOUR, evaluate=True),
    "recurrent-bare-once": Case(recurrent(0, 0, num_recurrences=1), transformer=FOUR, model=UNTIED),
    "looped": Case({"recursion_family": "looped", "num_refinement_blocks": 3}, transformer=FOUR),
    "looped-one-norm": Case(
        {"recursion_family": "looped", "num_refinement_blocks": 3, "state_norm": "none", "halt_loss_weight": 0.0},
        transformer=FOUR, model=UNTIED,
    ),
    "looped-gate": Case({"recursion_family": "looped", "num_refinement_blocks": 3, "exit_gate": True},
                        transformer=FOUR),
    "looped-gate-one-norm": Case(
        {"recursion_family": "looped", "num_refinement_blocks": 4, "exit_gate": True, "state_norm": "none",
         "exit_entropy_weight": 0.5},
        transformer=FOUR, model=UNTIED,
    ),
    # Deep supervision
    "looped-supervised": Case({"recursion_family": "looped", "num_refinement_blocks": 3, **DEEP}, transformer=FOUR,
                              evaluate=True),
    "looped-supervised-one-norm": Case(
        {"recursion_family": "looped", "num_refinement_blocks": 4, "state_norm": "none", "halt_loss_weight": 0.0,
         **DEEP, "deep_supervision_schedule": "exponential_decay", "deep_supervision_weight": 0.8}, transformer=FOUR,
        model=UNTIED,
    ),
    "core-supervised": Case(
        {"num_refinement_blocks": 3, "detach_between_refinements": False, **DEEP},
        transformer={**FOUR, **FULL_RECOMPUTE},
    ),
    "core-supervised-apart": Case(
        {"num_refinement_blocks": 3, **DEEP, "deep_supervision_schedule": "linear_decay"}, transformer=FOUR,
        model=UNTIED, evaluate=True,
    ),
    "hierarchical-supervised": Case(
        {"recursion_family": "hierarchical", "num_refinement_blocks": 3, "latent_backprop_depth": "1,2",
         "state_norm": "none", **DEEP, "deep_supervision_schedule": "linear_decay"}, transformer=FOUR,
    ),
    "hierarchical": Case({"recursion_family": "hierarchical"}, transformer=FOUR),
    "hierarchical-window": Case(
        {"recursion_family": "hierarchical", "num_latent_refinements": 3, "latent_backprop_depth": "2",
         "state_init": "trunc-normal"}, transformer=FOUR, model=UNTIED,
    ),
    "hierarchical-hrm-text": Case(
        {"recursion_family": "hierarchical", "num_latent_refinements": 3, "latent_backprop_depth": "2",
         "state_init": "trunc-normal", "halt_loss_weight": 0.0}, model=UNTIED,
        transformer={**FOUR, "normalization": "RMSNorm", "norm_weights": "ones", "attention_output_gate": True,
                     "swiglu": True, "add_bias_linear": False},
    ),
    "hierarchical-windows": Case(
        {"recursion_family": "hierarchical", "num_refinement_blocks": 3, "num_latent_refinements": 3,
         "latent_backprop_depth": "2,1,3", "state_norm": "none"}, transformer={**FOUR, **FULL_RECOMPUTE},
    ),
    "hierarchical-recomputed": Case({"recursion_family": "hierarchical", "state_norm": "none"},
                                    transformer={**SIX, **FULL_RECOMPUTE}),
}  # fmt: skip


def combined(model: Any, s: Tensor, e: Tensor, injection: str) -> Tensor:
    if injection == "concat":
        return torch.cat((s, e), -1) @ model.adapter.weight.T
    if injection == "diagonal":
        own, delta = model.injection, F.softplus(model.injection.dt_bias)
        return torch.exp(-delta * torch.exp(own.A_log)) * s + delta * (e @ own.B.view(len(delta), -1).T)
    return s + e if injection == "add" else s


def moved(model: Any, result: Tensor, state: Tensor, e: Tensor, knobs: Any, step: float) -> Tensor:
    if knobs.boundary == "gate":  # LoopUS
        own = model.boundary_gate
        low = (result - state) @ own.down.view(-1, state.shape[-1]).T
        delta = F.softplus(low @ own.up.view(-1, state.shape[-1]) + own.bias)
        a = torch.exp(delta * -torch.exp(own.A_log))
        return a * result + (1 - a) * state
    if knobs.boundary == "norm-inject":
        return result / (result.pow(2).mean(-1, keepdim=True) + model.config.layernorm_epsilon).sqrt() + e
    return state + step * (result - state)


def states(model: Any, x: Tensor, knobs: Any, layers: Any, start: Tensor) -> list[Tensor]:
    """The output state after each block, as the papers write it. ``layers(a, b)`` applies the layers from a to b."""
    total = model.config.num_layers
    if knobs.recursion_family == "recurrent":
        p, c, r = knobs.num_prelude_layers, knobs.num_coda_layers, knobs.num_recurrences
        step = 1 / r if knobs.recurrence_step == "mean" else float(knobs.recurrence_step)
        e = layers(0, p)(x)
        s = start if knobs.state_init == "sampled" else e
        norms = {"final": [], "core": range(r), "core-end": [r - 1]}[knobs.state_norm]
        for i in range(r):
            if knobs.backprop_depth and i == r - knobs.backprop_depth:
                s = s.detach()
            result = layers(p, total - c)(combined(model, s, e, knobs.injection))
            s = moved(model, model.output_norm(result) if i in norms else result, s, e, knobs, step)
        return [layers(total - c, total)(s)]
    norm = model.decoder.final_layernorm or (lambda h: h)
    out, z = x, torch.zeros_like(x)
    found = []
    if knobs.recursion_family == "looped":
        for _ in range(knobs.num_refinement_blocks):
            out = norm(layers(0, total)(out))
            found.append(out)
        return found
    if knobs.state_init != "zeros":
        z = model.initial_latent.expand_as(x)
    blocks, latents = knobs.num_refinement_blocks, knobs.num_latent_refinements
    if knobs.recursion_family == "core":
        out = torch.zeros_like(x)
        for _ in range(blocks):
            if knobs.detach_between_refinements:
                out, z = out.detach(), z.detach()
            for _ in range(latents):
                z = moved(model, norm(layers(0, total)(out + z + x)), z, x, knobs, 1.0)
            out = norm(layers(0, total)(out + z))
            found.append(out)
        return found
    window = [int(each) for each in knobs.latent_backprop_depth.split(",")]
    window = [1] * (blocks - len(window)) + window if window != [0] else [latents] * blocks
    for block in range(blocks):
        for i in range(latents):  # as HRM-Text: the last so many calls of the low module carry gradient
            low = moved(model, norm(layers(0, total // 2)(z + out)), z, x, knobs, 1.0)
            z = low if i >= latents - window[block] else low.detach()
        out = norm(layers(total // 2, total)(out + z))
        found.append(out)
    return found


def reference(model: Any, batch: dict[str, Tensor], knobs: Any) -> tuple[Tensor, Tensor]:
    """(objective, language-model loss), both [B, S]."""
    rotary = model.rotary_pos_emb(SEQ)

    def layers(start: int, end: int) -> Any:
        def apply(h: Tensor) -> Tensor:
            for layer in model.decoder.layers[start:end]:
                h, _ = layer(hidden_states=h, attention_mask=None, rotary_pos_emb=rotary)
            return h

        return apply

    x = model.embedding(input_ids=batch["input_ids"], position_ids=batch["position_ids"]) * knobs.embedding_multiplier
    start = sampled_start(tokens_so_far(batch["input_ids"]).T, x.shape[-1], knobs.state_std)
    found = [s.transpose(0, 1) for s in states(model, x, knobs, layers, start)]
    head = (model.embedding.word_embeddings if model.share_embeddings_and_output_weights else model.output_layer).weight
    if hasattr(model, "exit_gate"):
        return expected(model, [getattr(model, "output_norm", lambda h: h)(s) for s in found], head, batch, knobs)
    losses, halting, weights = [], [], weights_of(knobs, len(found))
    for state, weight in zip(found, weights, strict=True):
        last = state is found[-1]
        hidden = state if weight else state.detach()
        if hasattr(model, "output_norm"):
            with torch.set_grad_enabled(weight > 0):  # the halting head of earlier blocks teaches nothing but itself
                hidden = model.output_norm(hidden)
        logits = hidden @ head.T
        losses.append(F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none"))
        if hasattr(model, "halting_head"):
            q = (hidden if last else hidden.detach()) @ model.halting_head.weight + model.halting_head.bias
            right = (logits.argmax(-1) == batch["labels"]).float()
            halting.append(F.binary_cross_entropy_with_logits(q, right, reduction="none"))
    objective = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) + sum(halting) / len(found)
    return objective, losses[-1]


def weights_of(knobs: Any, blocks: int) -> list[float]:
    """What the loss after each block weighs: b, b (i + 1) / N or b 2^i / 2^(N-1), the last 1, over their sum."""
    if not knobs.enable_deep_supervision:
        return [0.0] * (blocks - 1) + [1.0]
    b, kind, weights = knobs.deep_supervision_weight, knobs.deep_supervision_schedule, [1.0] * blocks
    for i in range(blocks - 1):
        weights[i] = {"c": b, "l": b * (i + 1) / blocks, "e": b * 2**i / 2 ** (blocks - 1)}[kind[0]]
    return [weight / sum(weights) for weight in weights]


def expected(model: Any, found: list[Tensor], head: Tensor, batch: dict[str, Tensor], knobs: Any) -> Any:
    """The loss over the exits: the gate leaves with its probability, the last loop takes the rest."""
    total, left = 0.0, 1.0
    for state in found:
        loss = F.cross_entropy((state @ head.T).transpose(1, 2), batch["labels"], reduction="none")
        leaves = torch.sigmoid(state @ model.exit_gate.weight + model.exit_gate.bias) if state is not found[-1] else 1.0
        p = left * leaves
        total, left = total + p * loss + knobs.exit_entropy_weight * p * torch.log(p), left * (1 - leaves)
    return total, loss


def compare(case: Case) -> tuple[tuple[tuple[float, str], float], Training]:
    """The worst error of a gradient and the expected loss, and the run, with what it says of held-out batches."""
    wrapped = build_wrapped(case, Layout())
    model = wrapped.module
    found = Training([run_schedule(wrapped, case)], [full_gradients(wrapped)], [], {})
    total, expected, tokens = torch.zeros(()), 0.0, 0.0
    for batch in make_batches(case, 0):
        mask = batch["loss_mask"]
        objective, lm = reference(model, batch, case.resolved_recursion())
        total = total + (objective * mask).sum() / (mask.sum() * case.micro_batches)
        expected, tokens = expected + float((lm.detach() * mask).sum()), tokens + float(mask.sum())
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(total, list(trained.values()))
    error = worst_error(found.gradients[0], dict(zip(trained, gradients, strict=True)))
    if case.evaluate:
        found.evaluations.append(run_schedule(wrapped, case, 100, forward_only=True))
    return (error, expected / tokens), found


def in_one_process(cases: dict[str, Case]) -> dict[str, Any]:
    return {name: compare(case) for name, case in cases.items()}


@cache
def serial() -> dict[str, tuple[tuple[tuple[float, str], float], Training]]:
    found: dict[str, Any] = run_distributed(in_one_process, 1, CASES, timeout=300)[0]
    return found


@pytest.mark.parametrize("case", CASES)
def test_one_process_is_the_formula(case: str) -> None:
    ((error, name), expected), found = serial()[case]
    assert error <= 2e-6, name
    assert found.metrics[0]["lm loss"] == pytest.approx(expected, rel=2e-6)


def watched(model: Any, batch: dict[str, Tensor]) -> tuple[list[float], Tensor]:
    """How far each pass turns what it reads, and the state at the end, run stage after stage."""
    from megatron_recursive.losses.telemetry import turn
    from megatron_recursive.training.stagewise import run_passes

    turns: list[float] = []

    def watch(_: Any, read: Tensor, result: Tensor) -> None:
        total, count = turn(read, result, torch.ones_like(read[..., 0]), None)
        turns.append(float(total / count))

    with torch.no_grad():
        return turns, run_passes(model.eval(), batch["input_ids"], batch["position_ids"], watch)


def look(pp: int) -> list[tuple[list[float], Tensor]]:
    start_parallel(1, pp)
    return [watched(build_model(case, Layout(pp=pp)), make_batches(case, 0)[0])
            for case in (CASES["huginn"], CASES["gate-window"])]  # fmt: skip


def starts() -> dict[str, Any]:
    """What a sampled start depends on, and which weights of an injection decay."""
    from megatron.core.optimizer import OptimizerConfig, _get_param_groups, get_standard_config_overrides

    start_parallel()
    model, batch = build_model(CASES["huginn"]), make_batches(CASES["huginn"], 0)[0]
    ids, places = batch["input_ids"], batch["position_ids"]
    moved = ids.clone()
    moved[:, 9] = (moved[:, 9] + 1) % 64

    def start(tokens: Tensor, draw: int, train: bool) -> Tensor:
        model.train(train).draw = draw
        return model.initial_state(model.embed(tokens, places), tokens, places).output.detach()

    def seen(tokens: Tensor, train: bool) -> Tensor:
        return model.train(train)(**{**batch, "input_ids": tokens}).objective_BS.detach()

    found: dict[str, Any] = {
        "evaluation": torch.equal(start(ids, 1, False), start(moved, 2, False)),
        "training": torch.equal(start(ids, 1, True), start(ids, 1, True)),
        "another step": float((start(ids, 1, True) - start(ids, 2, True)).abs().mean()),
        "another token": [float(x) for x in (start(ids, 1, True) - start(moved, 1, True)).abs().amax((1, 2))],
        "leak": [float((seen(ids, train) - seen(moved, train))[:, :9].abs().max()) for train in (True, False)],
    }
    for name in ("huginn", "parcae", "gate"):
        chunk, config = build_model(CASES[name]), OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1)
        names = {id(p): key for key, p in chunk.named_parameters()}
        for group in _get_param_groups([chunk], config, get_standard_config_overrides(config)):
            added = {names[id(p)] for p in group["params"]} & {each.key for each in EVERY}
            found.update({key: group["wd_mult"] for key in added})
    return found


def test_a_sampled_start_depends_on_positions_and_in_training_on_the_step_and_the_tokens_so_far() -> None:
    (found,) = run_distributed(starts, 1, timeout=120)
    assert found["evaluation"] and found["training"] and found["another step"] > 0.1
    assert max(found["another token"][:9]) == 0 and min(found["another token"][9:]) > 0
    assert found["leak"] == [0.0, 0.0]
    assert found["adapter.weight"] == 1 and {found[f"injection.{name}"] for name in ("A_log", "dt_bias", "B")} == {0}
    assert {found[f"boundary_gate.{name}"] for name in ("A_log", "bias", "down", "up")} == {0}


def test_stages_watched_one_by_one_are_one_process() -> None:
    alone, ranks = run_distributed(look, 1, 1, timeout=120)[0], run_distributed(look, 2, 2, timeout=120)
    for rank in ranks:
        for (turns, state), (expected, whole) in zip(rank, alone, strict=True):
            assert turns == pytest.approx(expected, rel=1e-5) and torch.allclose(state, whole, atol=1e-5)
    assert min(alone[0][0]) > 0.1


OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000, "use_distributed_optimizer": True}
LAYOUTS = {
    "pp2": (2, Layout(pp=2)),
    "pp2-two-phases": (2, Layout(pp=2, phases="two", window=2)),
    "pp2-replayed-overlapped": (2, Layout(pp=2, ddp=OVERLAP, recompute_passes=True)),
    "tp2-sp": (2, Layout(tp=2, sequence_parallel=True)),
    "dp2-overlapped": (2, Layout(ddp=OVERLAP)),
    "pp2-uneven": (2, Layout(pp=2, stages={"num_layers_in_first_pipeline_stage": 1})),
    "pp4": (4, Layout(pp=4)),
    "pp2-tp2": (4, Layout(pp=2, tp=2)),
}
QUICK = ("pp2-replayed-overlapped",)
# Tensor parallelism lies within the layers, the added modules and the heads, and replay wraps each pass: there one case
# of each kind of these goes for those that only pass through them in another order, which the other layouts have.
KINDS = (
    "recurrent", "recurrent-part-window", "huginn", "parcae", "norm-in-core", "gate", "gate-hierarchical",
    "norm-inject-window", "looped-one-norm", "looped-gate", "looped-supervised", "core-supervised",
    "core-supervised-apart", "hierarchical-window", "hierarchical-hrm-text",
)  # fmt: skip
FEWER = {
    "pp2-replayed-overlapped": (*KINDS, "recurrent-free-passes", "recurrent-once", "hierarchical-windows"),
    "tp2-sp": KINDS,
    "pp2-tp2": ("recurrent", "huginn", "parcae", "gate", "looped-gate", "looped-supervised", "core-supervised-apart",
                "hierarchical-hrm-text"),
}  # fmt: skip


def over_ranks(cases: dict[str, Case], layout: Layout) -> dict[str, Training]:
    stages = layout.pp
    return {name: train(case, layout) for name, case in cases.items()
            if case.transformer["num_layers"] % stages == 0}  # fmt: skip


@cache
def parallel(layout: str) -> list[dict[str, Training]]:
    ranks, how = LAYOUTS[layout]
    cases = {name: CASES[name] for name in FEWER.get(layout, CASES)}
    return run_distributed(over_ranks, ranks, cases, how, timeout=240, rendezvous=30.0)


@pytest.mark.parametrize("layout", grid(LAYOUTS, quick=QUICK))
def test_ranks_are_one_process(layout: str) -> None:
    ranks = parallel(layout)
    bound = 5e-6 if LAYOUTS[layout][1].tp > 1 else 1e-6
    assert len(ranks[0]) >= 6
    for case in ranks[0]:
        expected = serial()[case][1]
        assert set().union(*(rank[case].gradients[0] for rank in ranks)) == set(expected.gradients[0])
        for rank in ranks:
            error, name = worst_error({**expected.gradients[0], **rank[case].gradients[0]}, expected.gradients[0])
            assert error <= bound, (case, name, error)
            told = [*zip(rank[case].metrics + rank[case].evaluations, expected.metrics + expected.evaluations,
                         strict=True)]  # fmt: skip
            assert len(told) == 1 + CASES[case].evaluate
            for mine, alone in told:
                for metric, value in mine.items():
                    assert value == pytest.approx(alone[metric], rel=bound, abs=1e-8), (case, metric)
