"""Small Hugging Face models with weights that make every path count."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig
from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM
from megatron_recursive.plan import RecursionConfig, build_plan
from megatron_recursive.plan.knobs import families_of

VOCAB, LAYERS = 61, 2
SHAPES: dict[str, dict[str, Any]] = {
    "llama-like": {},
    "odd heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "hidden_size": 36},
    "multi-query, qk norm": {"num_key_value_heads": 1, "qk_norm": "head", "norm_type": "layernorm"},
    "learned positions": {
        "position_embedding": "learned", "norm_type": "layernorm", "mlp_gated": False, "hidden_act": "gelu",
        "mlp_bias": True, "attention_bias": True, "attention_out_bias": True,
    },
    "olmo2-like": {"qk_norm": "full", "norm_placement": "post", "tie_word_embeddings": False},
    "sandwich": {"norm_placement": "sandwich", "layernorm_one_centered": True, "partial_rotary_factor": 0.5},
    "sum normed": {"norm_placement": "post", "output_norm_scope": "residual"},
    "no positions": {"position_embedding": "none"},
    "gated, norms without weights": {"attention_gate": True, "norm_weights": "ones", "attention_bias": True},
    "gated, full norms": {"attention_gate": True, "qk_norm": "full", "num_key_value_heads": 4},
}  # fmt: skip


def make_config(blocks: int = 3, latents: int = 2, recursion: dict[str, Any] | None = None, **shape: Any) -> Any:
    knobs = {"num_refinement_blocks": blocks, "num_latent_refinements": latents, **(recursion or {})}
    family = knobs.get("recursion_family", "core")
    knobs = {name: value for name, value in knobs.items() if family in (families_of(name, value) or (family,))}
    resolved = RecursionConfig(**knobs).resolved(embedding_init_std=0.15)
    values = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.15,
        **shape,
    }  # fmt: skip
    return RecursiveGPTConfig(plan=json.loads(build_plan(resolved).to_json()), recursion=resolved.to_dict(), **values)


def make_model(*args: Any, seed: int = 0, config: Any = None, **kwargs: Any) -> RecursiveGPTForCausalLM:
    """In evaluation mode. No weight is zero; halting probabilities lie around one half, so that tokens differ."""
    torch.manual_seed(seed)
    model = RecursiveGPTForCausalLM(config or make_config(*args, **kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("halting_head", "exit_gate")):
                parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.zero_()
            elif "norm" in name or name.endswith(("bias", "gate.up", "A_log", "adapter.weight", "injection.B")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(tokens: Tensor, pads: list[int]) -> tuple[Tensor, Tensor]:
    """The sequences behind so many tokens of padding, and the mask."""
    mask = torch.ones_like(tokens)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return tokens.masked_fill(mask == 0, 0), mask
