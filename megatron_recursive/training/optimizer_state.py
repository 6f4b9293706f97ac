"""The optimizer's state in checkpoints: on which layouts it goes on, and mends of Megatron 0.19 that let it be read.

The distributed optimizer has two ways to write its state. Megatron's default keeps the flat buffers of the layout that
wrote them, which only another data-parallel size can read. ``--dist-ckpt-optim-fully-reshardable`` writes a tensor for
each parameter, which any layout reads; while it is saved and loaded every rank holds its model-parallel share of the
state, 12 bytes a parameter, in host memory.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_recursive.errors import UserError
from megatron_recursive.plan.recursion_config import flag_of

HELD_BYTES = 12  # a parameter's fp32 copy and Adam's moments
LIMIT_BYTES = 10 * 10**9
"""Up to this share on a rank the state is written for any layout unasked."""
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


def choose_format(args: argparse.Namespace, parameters: int) -> None:
    """Settle how a distributed optimizer is written, where the flags leave it open."""
    if args.dist_ckpt_optim_fully_reshardable is None:
        share = parameters / (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
        fits = share * HELD_BYTES <= LIMIT_BYTES
        args.dist_ckpt_optim_fully_reshardable = args.use_distributed_optimizer and fits


def check_optimizer(folder: Path, common: Mapping[str, Any], run: argparse.Namespace) -> None:
    """Refuse an optimizer's state of another kind, or in the buffers of another layout, before anything is read."""
    saved = vars(common["args"])
    if run.finetune or run.no_load_optim or saved.get("no_save_optim") or folder.name == "release":
        return
    start_anew = "start its moments anew with --no-load-optim"
    theirs, mine = bool(saved.get("use_distributed_optimizer")), bool(run.use_distributed_optimizer)
    if theirs != mine:
        raise UserError(
            f"The checkpoint {folder} holds the state of another optimizer, with --use-distributed-optimizer "
            f"{'on' if theirs else 'off'} (this run: {'on' if mine else 'off'}); give it as it was, or {start_anew}."
        )
    changed = [name for name in LAYOUT if saved.get(name, 1) != getattr(run, name)]
    if mine and changed and not is_fully_reshardable(common):
        told = ", ".join(f"{flag_of(name)} {saved.get(name, 1)} (this run: {getattr(run, name)})" for name in changed)
        raise UserError(
            f"The checkpoint {folder} holds the optimizer's state in the buffers of its own layout, {told}; go on at "
            f"that layout with --dist-ckpt-optim-fully-reshardable up to a save, which any layout reads, or "
            f"{start_anew}."
        )


def is_fully_reshardable(common: Mapping[str, Any]) -> bool:
    """Whether the state is a tensor for each parameter. ``common`` is the checkpoint's common state."""
    kind = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    return kind in (None, "fully_reshardable", "fully_sharded_model_space")


@contextlib.contextmanager
def torch_adam_mended(optimizer: Any, *, reading: bool) -> Iterator[None]:
    """Mend what keeps torch's own Adam from being read back into the distributed optimizer.

    Without Apex and Transformer Engine, Megatron 0.19 asks for the step before the optimizer's state exists, looks for
    it among the tensors of each parameter, copies into fp32 parameters while gradients are recorded, and overwrites the
    step that it has read with the fresh one; it stays right in the parameter groups.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    inner = _torch_optimizers(optimizer) if reading else []
    for each, _, parameter in _parameters_of(inner):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        each.state[parameter] = {"step": torch.tensor(0.0), **moments}
    put = DistributedOptimizer._set_main_param_and_optimizer_states
    if inner:
        DistributedOptimizer._set_main_param_and_optimizer_states = lambda self, parameter, tensors: put(
            self, parameter, {"step": None, **tensors}
        )
    try:
        with torch.no_grad():
            yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = put
    for each, group, parameter in _parameters_of(inner):  # the groups are new ones
        each.state[parameter]["step"] = torch.tensor(float(group.get("step", 0.0)))


def _parameters_of(
    optimizers: list[torch.optim.Optimizer],
) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], torch.Tensor]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, group, parameter


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The fresh torch optimizers of the Adam kind inside Megatron's distributed ones."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [each.optimizer for each in chained if isinstance(each, DistributedOptimizer)]
    return [each for each in inner if isinstance(each, torch.optim.Adam | torch.optim.AdamW) and not each.state]
