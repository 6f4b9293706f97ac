"""Norms over torch's kernels that are right under tensor and sequence parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup


class SequenceParallelNorm(torch.nn.Module):
    """RMSNorm or LayerNorm over torch's kernels, for CPU and for GPUs without Transformer Engine.

    Under sequence parallelism each tensor-parallel rank norms its own tokens, so the gradients of weight and bias must
    be summed over the ranks; Megatron does that for parameters whose ``sequence_parallel`` is set
    (finalize_model_grads). Megatron's torch norm refuses sequence parallelism because it sets no such mark.

    Input and output: [..., hidden_size].
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.is_rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        make = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(make(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if not self.is_rms:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.is_rms:
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class FullProjectionNorm(MegatronModule):
    """What :func:`norm_together` needs of a projection whose heads are spread over tensor-parallel ranks.

    Weight and bias are sharded as the heads are, so that their gradients are complete on each rank, also under sequence
    parallelism (queries and keys have been gathered over the sequence by then).

    Args:
        num_heads: of the whole projection; their width is ``config.kv_channels``.

    Raises:
        ValueError: the heads do not divide among the ranks.
    """

    def __init__(self, config: TransformerConfig, num_heads: int, tp_group: ProcessGroup) -> None:
        super().__init__(config=config)
        if num_heads % tp_group.size():
            raise ValueError(
                f"a norm over {num_heads} heads (qk_norm_scope full) cannot be spread over {tp_group.size()} "
                "tensor-parallel ranks: heads and query groups must be multiples of them"
            )
        self.tp_group, self.size = tp_group, num_heads * config.kv_channels
        local = self.size // tp_group.size()
        make = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(make(local, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(local, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0, "bias": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )  # fmt: skip


def norm_together(norms: Sequence[FullProjectionNorm], heads: Sequence[Tensor]) -> list[Tensor]:
    """RMSNorm or LayerNorm of several projections, each over all of its heads at once, with messages for all in one.

    The statistics of a token are summed over the tensor-parallel ranks, forward and backward: one all-reduce each way
    (LayerNorm: two, since the mean comes first). They are taken in fp32 at least.

    Args:
        heads: for each norm this rank's heads, [S, B, heads, head_dim].
    """
    config = norms[0].config
    xs = [each.flatten(-2).to(torch.promote_types(each.dtype, torch.float32)) for each in heads]
    if config.normalization != "RMSNorm":
        xs = [x - mean for x, mean in zip(xs, _means(norms, xs), strict=True)]
    variances = _means(norms, [x.square() for x in xs])
    normed = []
    for norm, x, variance, given in zip(norms, xs, variances, heads, strict=True):
        x = x * torch.rsqrt(variance + config.layernorm_epsilon)
        x = x * (norm.weight + 1 if config.layernorm_zero_centered_gamma else norm.weight)
        if config.normalization != "RMSNorm":
            x = x + norm.bias
        normed.append(x.to(given.dtype).view(given.shape))
    return normed


def _means(norms: Sequence[FullProjectionNorm], xs: Sequence[Tensor]) -> list[Tensor]:
    """Over the last axis of all ranks. Every rank's heads depend on it: the backward sums over the ranks too."""
    total, group = torch.stack([x.sum(-1, keepdim=True) for x in xs]), norms[0].tp_group
    if group.size() > 1:
        total = tensor_parallel.reduce_from_tensor_model_parallel_region(total, group)
        total = tensor_parallel.copy_to_tensor_model_parallel_region(total, group)
    return [each / norm.size for each, norm in zip(total, norms, strict=True)]
