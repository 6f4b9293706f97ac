"""The modules of what recursion adds: their weights are declared in ``plan/added_parameters.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_recursive.plan.added_parameters import SEED, AddedParameter, start_of


def fresh_tensors(declared: Sequence[AddedParameter], hidden_size: int, knobs: object) -> dict[str, Tensor]:
    """Declared tensors by key, as a fresh model starts them, in fp32.

    Seeded ones are truncated normals of std 1 within two standard deviations, never trained (as in TRM): under detached
    blocks a learned one would get no gradient, and DDP's bucket counting breaks on such parameters.
    """
    generator, found = torch.Generator(device="cpu").manual_seed(SEED), {}
    for each in declared:
        start, tensor = start_of(each, knobs), torch.empty(each.sizes(hidden_size), device="cpu")
        if start == "trunc-normal":
            torch.nn.init.trunc_normal_(tensor, std=1.0, a=-2.0, b=2.0, generator=generator)
        elif start in ("identity", "identity at the end"):
            rows, columns = each.exported_sizes(hidden_size)
            ones = torch.eye(columns, device="cpu")
            tensor.copy_((ones[:rows] if start == "identity" else ones[-rows:]).view_as(tensor))
        else:
            tensor.fill_(float(start))
        found[each.key] = tensor
    return found


class AddedModule(MegatronModule):
    """A module whose weights are those declared for it.

    Replicated over tensor-parallel ranks; under sequence parallelism each rank sees its own tokens, and Megatron sums
    the gradients.
    """

    def __init__(
        self, config: TransformerConfig, declared: Sequence[AddedParameter], knobs: object, tp_group: ProcessGroup
    ) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        for key, fresh in fresh_tensors(declared, config.hidden_size, knobs).items():
            name = key.rpartition(".")[2]
            setattr(self, name, torch.nn.Parameter(fresh.to(config.params_dtype)))
            getattr(self, name).sequence_parallel = config.sequence_parallel


class TokenHead(AddedModule):
    """``q = w . h + b`` per token, in fp32: the halting head, or an exit gate. ``w`` starts at zero, and ``b`` of a
    halting head well below it, so that training starts deep.

    A token's own state only: a head over pooled states would see the future in a causal model.
    """

    weight: Tensor
    bias: Tensor

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """[S, B, H] (this rank's tokens under sequence parallelism) to logits [B, S] of all tokens, fp32."""
        logits_SB = _Logits.apply(hidden_SBH, self.weight) + self.bias.float()
        if self.config.sequence_parallel:
            # Every rank computes the same loss from the gathered logits, so the backward splits and does not sum.
            logits_SB = tensor_parallel.gather_from_sequence_parallel_region(
                logits_SB, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return logits_SB.transpose(0, 1)


class Adapter(AddedModule):
    """``W [state; input]``, of tokens [S, B, H]. As it starts, it gives the state where that starts at the input, or
    else the input."""

    weight: Tensor

    def forward(self, state_SBH: Tensor, input_SBH: Tensor) -> Tensor:
        both_SBC = torch.cat([state_SBH, input_SBH], dim=-1).to(self.weight.dtype)
        return F.linear(both_SBC, self.weight).to(state_SBH.dtype)


class Injection(AddedModule):
    """``a * state + delta * B input``, of tokens [S, B, H]: a decay whose linear map of the state has a norm below 1.

    ``delta = softplus(dt_bias)`` and ``a = exp(-delta exp(A_log))``, in fp32 (Parcae, arXiv 2604.12946).
    """

    A_log: Tensor
    dt_bias: Tensor
    B: Tensor

    def forward(self, state_SBH: Tensor, input_SBH: Tensor) -> Tensor:
        delta_H = F.softplus(self.dt_bias.float())
        decay_H = torch.exp(-delta_H * self.A_log.float().exp()).to(state_SBH.dtype)
        added_SBH = F.linear(input_SBH.to(self.B.dtype), self.B.view(-1, input_SBH.shape[-1])).to(state_SBH.dtype)
        return decay_H * state_SBH + delta_H.to(state_SBH.dtype) * added_SBH


class BoundaryGate(AddedModule):
    """``state + a * (result - state)``, of tokens [S, B, H]: each channel of each token moves by its own part ``a``.

    ``a = exp(-softplus(up^T down (result - state) + bias) exp(A_log))``, in fp32 (LoopUS, arXiv 2605.11011). As it
    starts, ``a`` is the step of the pass.
    """

    A_log: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor

    def forward(self, result_SBH: Tensor, state_SBH: Tensor) -> Tensor:
        change_SBH, size = result_SBH - state_SBH, result_SBH.shape[-1]
        low_SBR = F.linear(change_SBH.to(self.down.dtype), self.down.view(-1, size))
        delta_SBH = F.softplus(F.linear(low_SBR, self.up.view(-1, size).T, self.bias).float())
        part_SBH = torch.exp(-delta_SBH * self.A_log.float().exp())
        return state_SBH + part_SBH.to(change_SBH.dtype) * change_SBH


class BoundaryNorm(AddedModule):
    """``rms(result) + input``, of tokens [S, B, H], without weights (arXiv 2609.19107)."""

    def forward(self, result_SBH: Tensor, input_SBH: Tensor) -> Tensor:
        return F.rms_norm(result_SBH, result_SBH.shape[-1:], eps=self.config.layernorm_epsilon) + input_SBH


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


MODULES: dict[str, type[AddedModule]] = {  # by the model's attribute
    "halting_head": TokenHead, "exit_gate": TokenHead, "adapter": Adapter, "injection": Injection,
    "boundary_gate": BoundaryGate, "boundary_norm": BoundaryNorm,
}  # fmt: skip
