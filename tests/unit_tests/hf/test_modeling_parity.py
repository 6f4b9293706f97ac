"""The Hugging Face model against the Megatron model: logits, losses and gradients, for every option and many plans."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_recursive.plan.added_parameters import EVERY
from tests.distributed import run_distributed
from tests.models import SEQ, VOCAB, Case, Layout, make_batches, start_parallel, transformer_config
from tests.parameters import fill_weights
from tests.unit_tests.models.comparing import relative_error, worst_error
from tests.unit_tests.models.options import OPTIONS
from tests.unit_tests.models.test_families import CASES as FAMILIES
from tests.unit_tests.pipeline.cases import CASES as PIPELINE_CASES

PLANS = (
    "full-untied", "none-trunc-normal-untied", "none-trunc-normal-full", "deep", "halting-last", "halting-last-full",
    "halting-agrees", "halting-agrees-none", "supervised", "supervised-halting", "supervised-cut", "supervised-none",
    "supervised-after-free", "blind-start", "overwritten", "unread",
)  # fmt: skip
LLAMA = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
NORMS: dict[str, tuple[Case, dict[str, str]]] = {
    "post, full qk norm": (Case(transformer={**LLAMA, "qk_layernorm": True}),
                           {"norm_placement": "post", "qk_norm_scope": "full"}),
    "post of the sum": (Case({"detach_between_refinements": False}),
                        {"norm_placement": "post", "output_norm_scope": "residual"}),
    "sandwich": (Case(transformer={**LLAMA, "layernorm_zero_centered_gamma": True}), {"norm_placement": "sandwich"}),
    "sandwich of the sum, with biases": (
        Case({"state_norm": "none"}), {"norm_placement": "sandwich", "output_norm_scope": "residual"}),
}  # fmt: skip
CASES: dict[str, tuple[Case, dict[str, str]]] = {
    **{name: (case, {}) for name, case in OPTIONS.items() if name != "bf16"},
    **{name: (PIPELINE_CASES[name], {}) for name in PLANS},
    "multi-query, one layer": (Case(transformer={**LLAMA, "num_query_groups": 1, "num_layers": 1}), {}),
    "no positions": (Case(model={"position_embedding_type": "none"}), {}),
    **NORMS,
    **{name: (case, {}) for name, case in FAMILIES.items()},
}


@dataclass
class Answer:
    logits: Tensor
    losses: dict[str, float]
    gradients: dict[str, Tensor]


def build(case: Case, norms: dict[str, str]) -> Any:
    from megatron_recursive.models.layer_specs import local_block_spec
    from megatron_recursive.models.norm_placement import NormLayout
    from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel

    start_parallel()
    config = transformer_config(case, Layout())
    arguments = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": True, **case.model}
    spec, recursion = local_block_spec(config, norms=NormLayout(**norms)), case.resolved_recursion()
    model = RecursiveGPTModel(config, spec, VOCAB, SEQ, recursion=recursion, plan=case.plan, **arguments)
    fill_weights(model)
    return model


def make_config(case: Case, model: Any, norms: dict[str, str]) -> Any:
    """The same model in words of the Hugging Face config."""
    from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig

    theirs = model.config
    positions = case.model.get("position_embedding_type", "rope").removesuffix("_absolute")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if case.model.get("rope_scaling"):
        rope.update(rope_type="llama3", factor=case.model["rope_scaling_factor"], low_freq_factor=1.0,
                    high_freq_factor=4.0, original_max_position_embeddings=8192)  # fmt: skip
    return RecursiveGPTConfig(
        vocab_size=VOCAB, hidden_size=theirs.hidden_size, intermediate_size=theirs.ffn_hidden_size,
        num_layers=theirs.num_layers, num_attention_heads=theirs.num_attention_heads,
        num_key_value_heads=theirs.num_query_groups, head_dim=theirs.kv_channels,
        hidden_act="silu" if theirs.gated_linear_unit else "gelu", mlp_gated=theirs.gated_linear_unit,
        mlp_bias=theirs.add_bias_linear, attention_out_bias=theirs.add_bias_linear,
        attention_bias=theirs.add_bias_linear or theirs.add_qkv_bias,
        attention_gate=theirs.attention_output_gate, norm_weights=theirs.norm_weights,
        norm_type=theirs.normalization.lower(), norm_eps=theirs.layernorm_epsilon,
        layernorm_one_centered=theirs.layernorm_zero_centered_gamma,
        qk_norm=norms.get("qk_norm_scope", "head") if theirs.qk_layernorm else None,
        norm_placement=norms.get("norm_placement", "pre"), output_norm_scope=norms.get("output_norm_scope", "branch"),
        position_embedding=positions, rope_parameters=rope, partial_rotary_factor=case.model.get("rotary_percent", 1.0),
        max_position_embeddings=SEQ, tie_word_embeddings=case.model.get("share_embeddings_and_output_weights", True),
        plan=json.loads(model.plan.to_json()), recursion=model.recursion.to_dict(),
    )  # fmt: skip


RENAMED = {
    "embedding.word_embeddings.": "model.embed_tokens.", "embedding.position_embeddings.": "model.embed_positions.",
    "decoder.final_layernorm.": "model.norm.", "output_norm.": "model.norm.", "output_layer.": "lm_head.",
    **{each.key: each.exported for each in EVERY},
    "decoder.layers.": "model.layers.",
}  # fmt: skip
ADDED = {each.key: each for each in EVERY}
RENAMED_IN_LAYERS = {
    "self_attention.linear_proj.post_layernorm.": "post_attention_layernorm.",
    "self_attn_bda.post_layernorm.": "post_attention_layernorm.",
    "mlp.linear_fc2.post_layernorm.": "post_feedforward_layernorm.",
    "mlp_bda.post_layernorm.": "post_feedforward_layernorm.",
    "self_attention.linear_proj.": "self_attn.o_proj.", "mlp.linear_fc2.": "mlp.down_proj.",
    "self_attention.q_layernorm.": "self_attn.q_norm.", "self_attention.k_layernorm.": "self_attn.k_norm.",
    "self_attention.q_norm.": "self_attn.q_norm.", "self_attention.k_norm.": "self_attn.k_norm.",
    "input_layernorm.": "input_layernorm.", "pre_mlp_layernorm.": "pre_feedforward_layernorm.",
}  # fmt: skip


def renamed(name: str, table: dict[str, str]) -> str:
    old = next(old for old in table if name.startswith(old))
    return table[old] + name.removeprefix(old)


def converted(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Megatron's tensors (weights, or their gradients) under Hugging Face names."""
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith("decoder.layers."):
            shape = ADDED[name].exported_sizes(config.hidden_size) if name in ADDED else tensor.shape
            found[renamed(name, RENAMED)] = tensor.reshape(shape)  # Megatron may hold a vector of it
            continue
        number, _, rest = name.removeprefix("decoder.layers.").partition(".")
        kind, layer = rest.rpartition(".")[2], f"model.layers.{number}."
        if rest.startswith("self_attention.linear_qkv."):
            # Rows by query group: its queries' heads, its key's, its value's.
            queries = config.num_attention_heads // config.num_key_value_heads
            gates = queries if config.attention_gate else 0  # behind the queries
            groups = tensor.view(config.num_key_value_heads, queries + gates + 2, config.head_dim, *tensor.shape[1:])
            parts = {"q": groups[:, :queries], "k": groups[:, -2], "v": groups[:, -1]}
            if gates:
                parts["gate"] = groups[:, queries:-2]
            for letter, part in parts.items():
                found[f"{layer}self_attn.{letter}_proj.{kind}"] = part.reshape(-1, *tensor.shape[1:])
        elif rest.startswith("mlp.linear_fc1."):
            halves = tensor.chunk(2) if config.mlp_gated else (tensor,)
            for part, half in zip(("gate", "up") if config.mlp_gated else ("up",), halves, strict=True):
                found[f"{layer}mlp.{part}_proj.{kind}"] = half
        else:
            found[layer + renamed(rest, RENAMED_IN_LAYERS)] = tensor
    return found


def megatron_answer(model: Any, batch: dict[str, Tensor], config: Any) -> Answer:
    for parameter in model.parameters():
        parameter.grad = None
    mask, inputs = batch["loss_mask"], {k: v for k, v in batch.items() if k != "loss_mask"}
    output = model(**inputs, loss_mask=mask)
    objective_BS = getattr(output, "objective_BS", output)
    loss = (objective_BS * mask).sum() / mask.sum()
    loss.backward()
    metrics = getattr(output, "metrics", {"lm loss": torch.stack([(objective_BS * mask).sum().detach(), mask.sum()])})
    losses = {"loss": float(loss)}
    for name in ("lm loss", "halt loss"):
        if name in metrics:
            losses[name.replace(" ", "_")] = float(metrics[name][0] / metrics[name][1])
    gradients = converted({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, config)
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["position_ids"], batch["attention_mask"])
    return Answer(logits.clone(), losses, gradients)


def hugging_face_answer(model: Any, batch: dict[str, Tensor]) -> Answer:
    labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
    model.zero_grad()
    output = model(batch["input_ids"], shift_labels=labels)
    output.loss.backward()
    named = {"loss": output.loss, "lm_loss": output.lm_loss, "halt_loss": output.halt_loss}
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits
    return Answer(logits, {k: float(v) for k, v in named.items() if v is not None},
                  {name: p.grad for name, p in model.named_parameters() if p.requires_grad})  # fmt: skip


def both_answers(name: str) -> tuple[Answer, Answer]:
    from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM

    case, norms = CASES[name]
    theirs = build(case, norms)
    config = make_config(case, theirs, norms)
    ours = RecursiveGPTForCausalLM(config)
    trained = {name: weight for name, weight in theirs.named_parameters() if weight.requires_grad}
    tensors = {**trained, **dict(theirs.named_buffers())}
    weights = converted({k: v.detach() for k, v in tensors.items()}, config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    ours.load_state_dict(weights, strict=True)
    if theirs.plan.state_init == "sampled":  # in training each draws a start of its own
        theirs.eval(), ours.eval()
    batch = make_batches(case, 0)[0]
    return megatron_answer(theirs, batch, config), hugging_face_answer(ours, batch)


def all_answers() -> dict[str, tuple[Answer, Answer]]:
    return {name: both_answers(name) for name in CASES}


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[Answer, Answer]]:
    return run_distributed(all_answers, 1, timeout=400)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_models_agree(answers: dict[str, tuple[Answer, Answer]], name: str) -> None:
    expected, actual = answers[name]
    assert relative_error(actual.logits, expected.logits) < 5e-6
    assert actual.losses == pytest.approx(expected.losses, rel=5e-6)
    assert {"loss", "lm_loss"} <= set(actual.losses)
    assert ("halt_loss" in actual.losses) == any("halting_head" in each for each in actual.gradients)
    error, where = worst_error(actual.gradients, expected.gradients)
    assert error < 5e-5, where
