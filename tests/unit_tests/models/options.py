"""The option grid that several tests walk."""

from __future__ import annotations

from tests.models import Case

# Shapes and features of the layers that a recursive model has to carry; none of them is about the recursion.
OPTIONS: dict[str, Case] = {
    "layernorm-gelu-rope-tied": Case(),
    "rmsnorm-swiglu-untied-no-bias": Case(
        transformer={"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False},
        model={"share_embeddings_and_output_weights": False},
    ),
    "learned-positions": Case(model={"position_embedding_type": "learned_absolute"}),
    "rope-scaling": Case(model={"rope_scaling": True, "rope_scaling_factor": 32.0}),
    "rotary-percent": Case(model={"rotary_percent": 0.5}),
    "grouped-queries-qkv-bias": Case(
        transformer={"num_query_groups": 2, "add_bias_linear": False, "add_qkv_bias": True}
    ),
    "qk-norm-rmsnorm": Case(transformer={"normalization": "RMSNorm", "qk_layernorm": True, "num_query_groups": 2}),
    "qk-norm-layernorm-wide-heads": Case(transformer={"qk_layernorm": True, "kv_channels": 16}),
    "zero-centered-norm": Case(transformer={"layernorm_zero_centered_gamma": True, "normalization": "RMSNorm"}),
    "post-norm-full-qk": Case(
        transformer={"normalization": "RMSNorm", "qk_layernorm": True, "num_query_groups": 2, "add_bias_linear": False},
        norms={"norm_placement": "post", "qk_norm_scope": "full"},
    ),
    "sandwich-full-qk-layernorm": Case(
        transformer={"qk_layernorm": True}, norms={"norm_placement": "sandwich", "qk_norm_scope": "full"}
    ),
    "sandwich-residual": Case(norms={"norm_placement": "sandwich", "output_norm_scope": "residual"}),
    "gated": Case(transformer={"attention_output_gate": True, "num_query_groups": 2}),
    "no-halting": Case(recursion={"halt_loss_weight": 0.0}),
    "state-norm-none": Case(recursion={"state_norm": "none"}, model={"share_embeddings_and_output_weights": False}),
    "trunc-normal": Case(recursion={"state_init": "trunc-normal"}),
    "disabled": Case(recursion={"enable_recursive_refinement": False}),
    "bf16": Case(transformer={"bf16": True, "swiglu": True}, recursion={"state_init": "trunc-normal"}),
}
