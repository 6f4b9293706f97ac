"""HRM-Text (``hrm_text``): two stacks, each call of which ends in a norm, gated attention, norms without weights.

Its class keeps attention's four projections, and the MLP's two, apart; its files hold them merged. The layers of
``L_module`` come first here, which is ``low``.
"""

from __future__ import annotations

from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.published import OwnRecursion
from megatron_recursive.plan import RecursionConfig

# What its class calls a parameter: what its files call it, and which of how many equal parts it is.
_MERGED = {
    **{f"self_attn.{x}_proj.": ("attn.gqkv_proj.", at, 4) for at, x in enumerate(("gate", "q", "k", "v"))},
    **{f"mlp.{x}_proj.": ("mlp.gate_up_proj.", at, 2) for at, x in enumerate(("gate", "up"))},
    "self_attn.o_proj.": ("attn.o_proj.", 0, 1),
}


def _shape(config: Any) -> dict[str, Any]:
    # num_hidden_layers counts the applied ones.
    return {"num_layers": 2 * config.num_layers_per_stack, "num_query_groups": config.num_attention_heads}


def _knobs(config: Any, where: str) -> dict[str, Any]:
    blocks, given = config.H_cycles, list(config.L_bp_cycles)
    windows = ([1] * (blocks - len(given)) + given)[:blocks]
    if min(windows) < 1:
        raise UserError(f"{where} has L_bp_cycles {given}; here at least one low cycle of each block carries gradient.")
    return {
        "recursion_family": "hierarchical", "num_refinement_blocks": blocks, "num_latent_refinements": config.L_cycles,
        "latent_backprop_depth": ",".join(str(min(each, config.L_cycles)) for each in windows),
        "state_init": "trunc-normal", "state_norm": "final", "halt_loss_weight": 0.0,
        "embedding_multiplier": float(config.embedding_scale),
    }  # fmt: skip


def _expresses(recursion: RecursionConfig) -> bool:
    words = (recursion.recursion_family, recursion.state_init, recursion.state_norm, recursion.has_halting)
    return recursion.enable_recursive_refinement and words == ("hierarchical", "trunc-normal", "final", False)


def _config(arch: Architecture, recursion: RecursionConfig) -> dict[str, Any]:
    layers, blocks, latents = arch.num_layers // 2, recursion.num_refinement_blocks, recursion.num_latent_refinements
    return {
        "num_layers_per_stack": layers, "num_hidden_layers": layers * blocks * (latents + 1),
        "H_cycles": blocks, "L_cycles": latents, "L_bp_cycles": list(recursion.latent_windows),
        "embedding_scale": recursion.embedding_multiplier, "prefix_lm": False,
    }  # fmt: skip


def _stored(name: str) -> tuple[str, int, int]:
    for part, (whole, at, parts) in _MERGED.items():
        if part in name:
            return name.replace(part, whole), at, parts
    return name, 0, 1


def _layer(layer: int, num_layers: int) -> str:
    stack, within = divmod(layer, num_layers // 2)
    return f"model.{'LH'[stack]}_module.layers.{within}."


def _notes(config: Any) -> list[str]:
    return [
        "its prefix_lm lets the tokens of an instruction (token_type_ids 1) see each other in both directions; here "
        "attention is causal, as in its own class without token_type_ids, and an export says prefix_lm false."
    ] if config.prefix_lm else []  # fmt: skip


HRM_TEXT = OwnRecursion(_shape, _knobs, _expresses, _config, _stored, _layer, _notes)
