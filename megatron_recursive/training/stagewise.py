"""Forwards of a whole model outside of any schedule, for looking at it between iterations.

Stage after stage computes its part of a pass and broadcasts it to the others, so that every stage holds the states. In
evaluation mode, without dropout and gradient: no random state and no number of the training moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_recursive.models.recursion_state import run_plan
from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel
from megatron_recursive.plan import DecoderPass

Watch = Callable[[DecoderPass, Tensor, Tensor], None]


@contextmanager
def evaluating(run: argparse.Namespace, chunks: list[Any], optimizer: Any) -> Iterator[RecursiveGPTModel | None]:
    """The bare model, to be run by the first data-parallel replica; None on the others, which wait at a collective."""
    from megatron.training.training import (
        disable_forward_pre_hook,
        enable_forward_pre_hook,
        should_disable_forward_pre_hook,
    )

    gathers_late = should_disable_forward_pre_hook(run)
    if gathers_late:
        disable_forward_pre_hook(chunks, optimizer=optimizer)
    if parallel_state.get_data_parallel_rank() == 0:
        model: RecursiveGPTModel = unwrap_model(chunks[0])
        was_training, held = model.training, getattr(model.decoder, "input_tensor", None)
        model.eval()
        try:
            with torch.no_grad():
                yield model
        finally:
            model.train(was_training)
            model.decoder.set_input_tensor(held)
    else:
        yield None
    if gathers_late:
        enable_forward_pre_hook(chunks)


def run_passes(
    model: RecursiveGPTModel, input_ids: Tensor, positions: Tensor, watch: Watch | None = None
) -> Tensor:
    """The output state after the last pass, [S, B, H], on every stage; S is a part under sequence parallelism.

    ``watch`` sees each pass with what it read and what came out, both [S, B, H].
    """
    config, group, plan = model.config, model.pg_collection.pp, model.plan_of_step(None)
    ranks, dtype = model.pg_collection.tp.size() if config.sequence_parallel else 1, config.params_dtype
    shape = (input_ids.shape[1] // ranks, input_ids.shape[0], config.hidden_size)
    embedding = torch.empty(shape, dtype=dtype, device=input_ids.device)
    if model.pre_process:
        embedding = model.embed(input_ids, positions).to(dtype)
    state = model.initial_state(from_stage(model, embedding, 0), input_ids, positions)
    state.values = {name: from_stage(model, value, 0) for name, value in state.values.items()}

    def on_the_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def told(decoder_pass: DecoderPass, *values_SBH: Tensor) -> Tensor:
            mine = function(decoder_pass, *values_SBH) if model.pre_process else torch.empty_like(values_SBH[0])
            return from_stage(model, mine, 0)

        return told

    state.combine, state.move = on_the_first(model.combine), on_the_first(model.move)

    def decode(decoder_pass: DecoderPass, read_SBH: Tensor) -> Tensor:
        hidden_SBH = read_SBH
        for stage in range(group.size()):
            if group.rank() == stage:
                model.decoder.set_input_tensor(None if model.pre_process else hidden_SBH)
                hidden_SBH = model.decode(
                    hidden_SBH if model.pre_process else None, None, stack=decoder_pass.stack,
                    closes=plan.closes(decoder_pass), index=decoder_pass.index,
                ).to(dtype)  # fmt: skip
            hidden_SBH = from_stage(model, hidden_SBH, stage)
        if watch is not None:
            watch(decoder_pass, read_SBH, hidden_SBH)
        return hidden_SBH

    for _ in run_plan(plan, state, decode):
        pass
    return state.output


def from_stage(model: RecursiveGPTModel, tensor: Tensor, stage: int) -> Tensor:
    """``tensor`` of a pipeline stage, on all of them."""
    group = model.pg_collection.pp
    if group.size() > 1:
        # Into memory of its own: without layers a stage's result is what it read.
        tensor = tensor.contiguous() if group.rank() == stage else tensor.new_empty(tensor.shape)
        torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, stage), group=group)
    return tensor
