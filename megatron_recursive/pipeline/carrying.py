"""Carried states over pipeline stages: the last stage has the output states at a step's end, the first one needs them.

They travel when the schedule is over and nothing else is under way. Each is one message, which the first stage is about
to receive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel


def send_back(model: RecursiveGPTModel, group: ProcessGroup) -> None:
    """Move what the last stage has left of a step's outputs to the first one, in the pipeline-parallel group."""
    carried = model.carried
    if carried is None or group.size() == 1:
        return
    first, last = (torch.distributed.get_global_rank(group, rank) for rank in (0, group.size() - 1))
    under_way: list[Any] = []
    if model.pre_process:
        shape, dtype, device = carried.like
        outputs = [torch.empty(shape, dtype=dtype, device=device) for _ in range(carried.micro_batches)]
        under_way = [torch.distributed.irecv(state, last, group=group) for state in outputs]
        carried.left["output"] = outputs
    if model.post_process:
        sent = carried.left.pop("output")
        under_way = [torch.distributed.isend(state.contiguous(), first, group=group) for state in sent]
    for request in under_way:
        request.wait()
