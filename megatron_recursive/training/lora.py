"""The flags of low-rank adapters (``plan/lora.py``), what they exclude, and which checkpoints they go with."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of
from megatron_recursive.plan.lora import TARGETS, LoRA

FLAGS = {"lora_rank": None, "lora_alpha": None, "lora_targets": None, "lora_per_pass": False}  # and their defaults
CHANGES_PASSES = {"recurrence_distribution": "fixed", "recurrence_curriculum": None, "backprop_curriculum": None,
                  "grow_depth_at": None, "eval_depths": None, "num_supervision_steps": 1}  # fmt: skip


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("low-rank adapters (LoRA)")
    group.add_argument(
        "--lora-rank", type=int, metavar="R",
        help="Train adapters of this rank beside the layers' matrices, and freeze all other weights. From a checkpoint "
        "without adapters start with --finetune (or --init-from-gpt), into another --save.",
    )
    group.add_argument(
        "--lora-alpha", type=float, metavar="A", help="An adapter counts A / R (default: 2 R, by which it counts 2)."
    )
    group.add_argument(
        "--lora-targets", nargs="+", choices=tuple(TARGETS), metavar="NAME",
        help="Matrices that have one: linear_qkv (in an export q_proj, k_proj, v_proj, which share A), linear_proj "
        "(o_proj), linear_fc1 (gate_proj, up_proj, which share A), linear_fc2 (down_proj). Default: all four.",
    )
    group.add_argument(
        "--lora-per-pass", action="store_true",
        help="An adapter of its own for each pass with gradient, in place of one over all passes (relaxed recursion).",
    )


def refuse_lora(args: argparse.Namespace) -> None:
    """What adapters do not go with."""
    if args.lora_rank is None:
        for name in FLAGS:
            if getattr(args, name):
                raise UserError(f"{flag_of(name)} needs --lora-rank, such as --lora-rank 16.")
        return
    if args.lora_rank < 1:
        raise UserError(f"--lora-rank is {args.lora_rank}; give a positive number.")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        raise UserError(f"--lora-alpha is {args.lora_alpha:g}; give a positive number.")
    if args.transformer_impl != "local" or args.spec is not None:
        given = f"--transformer-impl {args.transformer_impl}" if args.spec is None else f"--spec {' '.join(args.spec)}"
        raise UserError(f"--lora-rank adapts Megatron's own linears, which {given} may replace; "
                        "give --transformer-impl local without --spec.")  # fmt: skip
    if args.train_only is not None:
        raise UserError(f"--lora-rank and --train-only {args.train_only} each train weights alone; leave one out.")
    for name in ("adapter_lr_factor", "head_lr_factor"):
        if getattr(args, name) != 1:
            raise UserError(f"{flag_of(name)} {getattr(args, name):g} says nothing beside --lora-rank, which freezes "
                            "what a recursion adds; leave it out.")  # fmt: skip
    if not args.lora_per_pass:
        return
    if args.throttle:
        raise UserError("--throttle divides by the passes that share weights, but with --lora-per-pass each pass has "
                        "its own; leave either out.")  # fmt: skip
    if not args.enable_recursive_refinement:
        raise UserError("--lora-per-pass needs a recursion, since a plain model has one pass; leave it out.")
    for name, fixed in CHANGES_PASSES.items():
        if getattr(args, name) != fixed:
            raise UserError(f"--lora-per-pass needs the same passes at every step, which {flag_of(name)} "
                            f"{getattr(args, name)} changes; leave either out.")  # fmt: skip


def check_adapters(folder: Path, saved: Mapping[str, Any], run: argparse.Namespace, *, is_start: bool) -> None:
    """Refuse a checkpoint of other adapters; ``is_start``: its weights alone are read."""
    theirs, mine = LoRA.from_args(saved), LoRA.from_args(vars(run))
    if theirs is None:
        if mine is not None and not is_start:
            raise UserError(f"The checkpoint {folder} holds no adapters (--lora-rank); start from its weights with "
                            "--finetune, into another --save.")  # fmt: skip
    elif mine is None or replace(theirs, seed=mine.seed) != mine:
        raise UserError(f"The checkpoint {folder} holds adapters of {_told(theirs)} (this run: {_told(mine)}); give "
                        "its own, or export it merged (convert export) and import that.")  # fmt: skip


def refuse_blind_adapter(models: Sequence[Any], folder: Path) -> None:
    """LoRA freezes the map of --injection concat, which behind a start that is no input reads no state before it is
    trained; imports of 0.1 read no input."""
    for model in models:
        adapter = getattr(model, "adapter", None)
        if adapter is None or not model.config.lora or model.plan.starts_at_input:
            continue
        state, given = (half.any() for half in adapter.weight.chunk(2, dim=1))
        if not given:
            raise UserError(f"--lora-rank freezes the map of --injection concat, and that of {folder} reads no token; "
                            "import the donor anew, and train it first, without LoRA.")  # fmt: skip
        if not state:
            raise UserError(f"--lora-rank freezes the map of --injection concat, and that of {folder} reads no state "
                            "yet, so that all recurrences would be one; train it first, without LoRA.")  # fmt: skip


def _told(lora: LoRA | None) -> str:
    if lora is None:
        return "none"
    more = " --lora-per-pass" if lora.per_pass else ""
    return f"--lora-rank {lora.rank} --lora-alpha {lora.alpha:g} --lora-targets {' '.join(lora.targets)}{more}"


def take_adapters(args: argparse.Namespace, saved: Mapping[str, Any]) -> None:
    """--use-checkpoint-args: the adapters that a checkpoint has."""
    if saved.get("lora_rank") is not None:
        vars(args).update({name: saved.get(name, default) for name, default in FLAGS.items()})
