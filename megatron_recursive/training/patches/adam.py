"""Patch of megatron-core 0.19: torch's own Adam is read back into the distributed optimizer.

Without Apex and Transformer Engine, Megatron asks for the step before the optimizer's state exists, looks for it among
the tensors of each parameter (``DistributedOptimizer._set_main_param_and_optimizer_states``, a method without a hook),
copies into fp32 parameters while gradients are recorded, and overwrites the step that it has read with the fresh one;
it stays right in the parameter groups.

A rank of which nothing is trained (--train-only heads) counts no step, of which Megatron saves rank 0's, and torch's
Adam on such a rank is refused by an assertion. There the step stands beside no parameter, and in the empty groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

NOWHERE = "no parameter"  # the key of a state that belongs to none; torch hands it through


def tell_step(optimizer: Any) -> None:
    """Before a checkpoint is written or read: the step of other ranks, where this one trains nothing."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    inner: list[Any] = [each.optimizer for each in chained if getattr(each, "optimizer", None) is not None]
    empty = [each for each in inner if not any(group["params"] for group in each.param_groups)]
    for each in inner:
        each.state.pop(NOWHERE, None)
    steps = [state["step"] for each in inner for state in each.state.values() if "step" in state]
    steps += [group["step"] for each in inner if each not in empty for group in each.param_groups if "step" in group]
    known: list[float] = [0.0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(known, max(map(float, steps), default=0.0))
    for each in empty:
        state: Any = each.state
        if isinstance(each, torch.optim.Adam | torch.optim.AdamW):
            state[NOWHERE] = {"step": torch.tensor(max(known))}
        for group in each.param_groups:
            group["step"] = int(max(known))


@contextlib.contextmanager
def torch_adam_mended(optimizer: Any, *, reading: bool) -> Iterator[None]:
    """Around the loading of a checkpoint into ``optimizer``; ``reading`` says whether there is one."""
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
