"""Carried states over pipeline stages: the last stage has the output states at a step's end, the first one needs them.

They travel when the schedule is over and nothing else is under way. Each is one message, which the first stage is about
to receive. Where a coda makes a trip of its own, the first stage has what the coda reads, and nothing travels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_recursive.models.recursion_state import RecursionState
from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel
from megatron_recursive.plan import DecoderPass, RecursionPlan


def leave_states(model: RecursiveGPTModel, plan: RecursionPlan, state: RecursionState, last: DecoderPass) -> None:
    """On the first stage, before the last pass around the ring; the data of the states is about to go."""
    for name in plan.carried if model.carried is not None else ():
        if name != "output" or last.index > plan.carried_behind:
            model.carried.leave(name, state.values[name].detach().clone())  # type: ignore[union-attr]


def leave_output(model: RecursiveGPTModel, plan: RecursionPlan, last: DecoderPass, output_SBH: Any) -> None:
    """On the last stage, behind the last pass around the ring."""
    if model.carried is not None and last.index == plan.carried_behind:
        model.carried.leave("output", output_SBH)


def send_back(model: RecursiveGPTModel, plan: RecursionPlan, group: ProcessGroup, last: DecoderPass) -> None:
    """Move what the last stage has left of a step's outputs to the first one, in the pipeline-parallel group."""
    carried = model.carried
    if carried is None or group.size() == 1 or last.index > plan.carried_behind:
        return
    sender, receiver = (torch.distributed.get_global_rank(group, rank) for rank in (group.size() - 1, 0))
    under_way: list[Any] = []
    if model.pre_process:
        assert carried.like is not None
        shape, dtype, device = carried.like
        outputs = [torch.empty(shape, dtype=dtype, device=device) for _ in range(carried.micro_batches)]
        under_way = [torch.distributed.irecv(state, sender, group=group) for state in outputs]
        carried.left["output"] = outputs
    if model.post_process:
        sent = carried.left.pop("output")
        under_way = [torch.distributed.isend(state.contiguous(), receiver, group=group) for state in sent]
    for request in under_way:
        request.wait()
