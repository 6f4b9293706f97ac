"""The flags of ``models/norm_placement.py``: what they are, and what they exclude."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.models.norm_placement import OUTPUT_SCOPES, PLACEMENTS, QK_SCOPES, NormLayout
from megatron_recursive.plan.knobs import flag_of


def add_norm_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("norms of the layers")
    group.add_argument(
        "--norm-placement", choices=PLACEMENTS, default="pre",
        help="Norm what attention and MLP read (pre, GPT and Llama), what they give (post, OLMo-2), or both (sandwich, "
        "Gemma-2).",
    )
    group.add_argument(
        "--output-norm-scope", choices=OUTPUT_SCOPES, default="branch",
        help="With --norm-placement post or sandwich, norm the branch before it is added (branch, OLMo-2 and Gemma-2), "
        "or the sum with the residual stream (residual, TRM and Huginn).",
    )
    group.add_argument(
        "--qk-norm-scope", choices=QK_SCOPES, default="head",
        help="With --qk-layernorm, norm queries and keys per head (head, Qwen3), or over all heads at once (full, "
        "OLMo-2).",
    )
    group.add_argument(
        "--norm-weights", choices=("learned", "ones"), default="learned",
        help="Train the weights of all norms, or leave them at one, as if there were none (ones, HRM-Text).",
    )


def norm_layout(args: Mapping[str, Any]) -> NormLayout:
    """The layout that arguments ask for; those of a stock Megatron checkpoint name none."""
    return NormLayout(**{field.name: args.get(field.name, field.default) for field in fields(NormLayout)})


def refuse_norms(args: argparse.Namespace) -> None:
    """Norm flags that contradict each other, or that the layers in use cannot have."""
    if args.norm_placement == "pre" and args.output_norm_scope == "residual":
        raise UserError("--output-norm-scope residual needs --norm-placement post or sandwich.")
    if args.qk_norm_scope == "full" and not args.qk_layernorm:
        raise UserError("--qk-norm-scope full needs --qk-layernorm.")
    switches = (("--qk-layernorm", args.qk_layernorm), ("--apply-layernorm-1p", args.layernorm_zero_centered_gamma))
    others = "".join(f" without {name}" for name, on in switches if on)
    if args.norm_weights == "ones" and (args.normalization != "RMSNorm" or others):
        raise UserError(f"--norm-weights ones needs --normalization RMSNorm{others}.")
    changed = [name for name, value in vars(norm_layout(vars(args))).items() if value != getattr(NormLayout(), name)]
    if not changed:
        return
    given = f"{flag_of(changed[0])} {getattr(args, changed[0])}"
    if args.spec is not None:
        raise UserError(f"{given} and --spec exclude each other, since the spec places the norms; give either.")
    if args.use_transformer_engine_op_fuser and args.transformer_impl != "local":
        raise UserError(f"{given} and --use-transformer-engine-op-fuser exclude each other; leave either out.")
    if args.qk_norm_scope == "full" and args.apply_wd_to_qk_layernorm:
        raise UserError("--apply-wd-to-qk-layernorm does not reach the norms of --qk-norm-scope full; leave it out.")
