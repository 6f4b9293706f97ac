"""HRM-Text (``hrm_text``), recursive in itself: what its config and its files say of an architecture and a plan.

Its class keeps attention's four projections, and the MLP's two, apart; its files hold them merged. The layers of
``L_module`` come first here, which is ``low``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.plan import RecursionConfig, build_plan

PREFIXED = (
    "its prefix_lm lets the tokens of an instruction (token_type_ids 1) see each other in both directions; here "
    "attention is causal, as in its own class without token_type_ids, and an export says prefix_lm false."
)
# What its class calls a parameter: what its files call it, and which of how many equal parts it is.
_MERGED = {
    **{f"self_attn.{x}_proj.": ("attn.gqkv_proj.", at, 4) for at, x in enumerate(("gate", "q", "k", "v"))},
    **{f"mlp.{x}_proj.": ("mlp.gate_up_proj.", at, 2) for at, x in enumerate(("gate", "up"))},
    "self_attn.o_proj.": ("attn.o_proj.", 0, 1),
}


def shape(config: Any) -> dict[str, Any]:
    """What its config calls otherwise than others; its ``num_hidden_layers`` counts the applied ones."""
    return {"num_layers": 2 * config.num_layers_per_stack, "num_query_groups": config.num_attention_heads}


def layer_prefix(layer: int, num_layers: int) -> str:
    stack, within = divmod(layer, num_layers // 2)
    return f"model.{'LH'[stack]}_module.layers.{within}."


def knobs(config: Any, where: str) -> dict[str, Any]:
    """Its recursion. Each block has a window: where fewer are given, the others are 1 and come first."""
    if config.tie_word_embeddings:
        raise UserError(f"{where} has tie_word_embeddings; an HRM-Text whose head is its embedding is not converted.")
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


def expresses(recursion: RecursionConfig) -> bool:
    words = (recursion.recursion_family, recursion.state_init, recursion.state_norm, recursion.boundary)
    is_hrm = words == ("hierarchical", "trunc-normal", "final", "none") and not recursion.has_halting
    return recursion.enable_recursive_refinement and is_hrm


def config_of(arch: Architecture, recursion: RecursionConfig) -> dict[str, Any]:
    return {
        "num_layers_per_stack": arch.num_layers // 2,
        "num_hidden_layers": build_plan(recursion).unrolled_layers(arch.num_layers),
        "H_cycles": recursion.num_refinement_blocks, "L_cycles": recursion.num_latent_refinements,
        "L_bp_cycles": list(recursion.latent_windows),
        "embedding_scale": recursion.embedding_multiplier, "prefix_lm": False,
    }  # fmt: skip


def parameters(fetch: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Parameters by the names of its class; ``fetch`` knows those of its files."""
    held: dict[str, Tensor] = {}

    def part(name: str) -> Tensor:
        found = next((each for each in _MERGED if each in name), "")
        stored, at, parts = _MERGED.get(found, ("", 0, 1))
        whole = name.replace(found, stored) if found else name
        if whole not in held:
            held.clear()  # its parts are asked for one after another
            held[whole] = fetch(whole)
        return held[whole].chunk(parts)[at] if parts > 1 else held.pop(whole)

    return part
