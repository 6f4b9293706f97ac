"""The halting head: one logit per token from that token's own output state."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


class HaltingHead(MegatronModule):
    """``q = w . h + b`` per token, in fp32; ``w`` starts at zero and ``b`` well below it, so that training starts deep.

    A token's own state only: a head over pooled states would see the future in a causal model. The weight is one vector
    (not a 1 x H matrix), so that optimizers which treat matrices apart leave it alone. Replicated over tensor-parallel
    ranks; under sequence parallelism each rank sees its own tokens, and Megatron sums the gradients.
    """

    def __init__(self, config: TransformerConfig, bias: float, tp_group: ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(torch.zeros(config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.full((1,), bias, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """[S, B, H] (this rank's tokens under sequence parallelism) to logits [B, S] of all tokens, fp32."""
        logits_SB = _Logits.apply(hidden_SBH, self.weight) + self.bias.float()
        if self.config.sequence_parallel:
            # Every rank computes the same loss from the gathered logits, so the backward splits and does not sum.
            logits_SB = tensor_parallel.gather_from_sequence_parallel_region(
                logits_SB, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return logits_SB.transpose(0, 1)


class _Logits(torch.autograd.Function):
    """``h @ w`` in fp32. Until the backward it keeps ``h`` as it is given; autograd would keep an fp32 copy."""

    @staticmethod
    def forward(ctx: Any, hidden_SBH: Tensor, weight_H: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_SBH, weight_H)
        return hidden_SBH.float() @ weight_H.float()

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor | None, Tensor]:
        hidden_SBH, weight_H = ctx.saved_tensors
        of_hidden = None
        if ctx.needs_input_grad[0]:
            of_hidden = (grad_SB.unsqueeze(-1) * weight_H.float()).to(hidden_SBH.dtype)
        of_weight = grad_SB.flatten() @ hidden_SBH.float().flatten(0, 1)
        return of_hidden, of_weight.to(weight_H.dtype)
