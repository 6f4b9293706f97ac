"""The optimizer's state in checkpoints: on which layouts it goes on.

The distributed optimizer has two ways to write its state. Megatron's default keeps the flat buffers of the layout that
wrote them, which only another data-parallel size can read. ``--dist-ckpt-optim-fully-reshardable`` writes a tensor for
each parameter, which any layout reads; while it is saved and loaded every rank holds its model-parallel share of the
state, 12 bytes a parameter (16 with --ema-decay), in host memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of

HELD_BYTES = 12  # a parameter's fp32 copy and Adam's moments; --ema-decay has another copy
LIMIT_BYTES = 10 * 10**9
"""Up to this share on a rank the state is written for any layout unasked."""
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


def choose_format(args: argparse.Namespace, parameters: int) -> None:
    """Settle how a distributed optimizer is written, where the flags leave it open."""
    if args.dist_ckpt_optim_fully_reshardable is None:
        share = parameters / (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
        held = HELD_BYTES + (0 if args.ema_decay is None else 4)
        fits = share * held <= LIMIT_BYTES
        args.dist_ckpt_optim_fully_reshardable = args.use_distributed_optimizer and fits


def check_optimizer(folder: Path, common: Mapping[str, Any], run: argparse.Namespace) -> None:
    """Refuse an optimizer's state of another kind, or in the buffers of another layout, before anything is read."""
    saved = vars(common["args"])
    if run.finetune or run.no_load_optim or folder.name == "release":
        return
    start_anew = "start its moments and the learning rate's schedule anew with --no-load-optim"
    if saved.get("no_save_optim"):
        raise UserError(f"The checkpoint {folder} holds no optimizer's state (--no-save-optim); {start_anew}.")
    of_heads = saved.get("train_only") == "heads"
    if of_heads != (run.train_only == "heads"):
        flag = f"--train-only heads {'on (this run: off)' if of_heads else 'off (this run: on)'}"
        raise UserError(
            f"The checkpoint {folder} was trained with {flag}, so that its optimizer has other weights; start from the "
            f"checkpoint's weights with --finetune, or {start_anew}."
        )
    for flag, theirs, mine in (
        ("--optimizer", saved.get("optimizer", "adam"), run.optimizer),
        ("--use-distributed-optimizer", *(_on(a.get("use_distributed_optimizer")) for a in (saved, vars(run)))),
        *((flag_of(name), _on(saved.get(name)), _on(getattr(run, name)))  # only the distributed one has fp32 always
          for name in ("bf16", "fp16") if not run.use_distributed_optimizer),
        ("--decoupled-lr", *(_on(a.get("decoupled_lr") is not None) for a in (saved, vars(run)))),
        ("learning-rate factors (--core-lr-factor, --adapter-lr-factor, --head-lr-factor, --throttle)",
         _factors(saved.get("rate_factors")), _factors(run.rate_factors)),
    ):  # fmt: skip
        if theirs != mine:
            raise UserError(
                f"The checkpoint {folder} holds the state of another optimizer, with {flag} {theirs} (this run: "
                f"{mine}); give it as it was, or {start_anew}."
            )
    mine = run.use_distributed_optimizer
    changed = [name for name in LAYOUT if saved.get(name, 1) != getattr(run, name)]
    if mine and changed and not is_fully_reshardable(common):
        told = ", ".join(f"{flag_of(name)} {saved.get(name, 1)} (this run: {getattr(run, name)})" for name in changed)
        raise UserError(
            f"The checkpoint {folder} holds the optimizer's state in the buffers of its own layout, {told}; go on at "
            f"that layout with --dist-ckpt-optim-fully-reshardable up to a save, which any layout reads, or "
            f"{start_anew}."
        )


def kept_settings(common: Mapping[str, Any], run: argparse.Namespace) -> list[str]:
    """Notes on what Megatron takes from the checkpoint's parameter groups, whatever this run says."""
    if run.finetune or run.no_load_optim:
        return []
    saved = vars(common["args"])
    names = ("sgd_momentum",) if run.optimizer == "sgd" else ("adam_beta1", "adam_beta2", "adam_eps")
    return [
        f"{flag_of(name)} stays at the checkpoint's {saved[name]:g} (this run: {getattr(run, name):g}), which only "
        "--no-load-optim changes" for name in names if saved.get(name, getattr(run, name)) != getattr(run, name)
    ]  # fmt: skip


def _on(flag: object) -> str:
    return "on" if flag else "off"


def _factors(by_part: Mapping[str, float] | None) -> str:
    return ", ".join(f"{part} x {factor:g}" for part, factor in sorted((by_part or {}).items())) or "none"


def is_fully_reshardable(common: Mapping[str, Any]) -> bool:
    """Whether the state is a tensor for each parameter. ``common`` is the checkpoint's common state."""
    kind = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    return kind in (None, "fully_reshardable", "fully_sharded_model_space")
