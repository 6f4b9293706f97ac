"""Transformer Engine's modules as Megatron 0.19 calls them: the same names, arguments, parameters and marks on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Base(torch.nn.Module):
    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass


def _normed(x: Tensor, kind: str, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    weight = weight + 1 if zero_centered else weight
    if kind == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class _Norm(_Base):
    def __init__(
        self, normalized_shape: Any = None, eps: float = 1e-5, sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None, zero_centered_gamma: bool = False, hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert isinstance(normalized_shape, int) and set(kwargs) <= {"device"}
        self.eps, self.zero_centered_gamma, kind = eps, zero_centered_gamma, type(self).__name__
        make = torch.zeros if zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(make(normalized_shape, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel
        self.register_parameter("bias", None)
        if kind == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(normalized_shape, dtype=params_dtype))
            self.bias.sequence_parallel = sequence_parallel

    def forward(self, input: Tensor) -> Tensor:
        return _normed(input, type(self).__name__, self.weight, self.bias, self.eps, self.zero_centered_gamma)


class LayerNorm(_Norm):
    def __init__(
        self, normalized_shape: Iterable[int] | int | None = None, eps: float = 1e-5,
        sequence_parallel: bool | None = None, params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False, hidden_size: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, sequence_parallel, params_dtype, zero_centered_gamma, hidden_size,
                         **kwargs)  # fmt: skip


class RMSNorm(_Norm):
    def __init__(
        self, normalized_shape: Iterable[int] | int | None = None, eps: float = 1e-5,
        sequence_parallel: bool | None = None, params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False, hidden_size: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, sequence_parallel, params_dtype, zero_centered_gamma, hidden_size,
                         **kwargs)  # fmt: skip


class Linear(_Base):
    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None, rng_tracker_name: str | None = None,
        init_method: Callable[..., Any] | None = None, bias: bool = True, return_bias: bool = False,
        params_dtype: torch.dtype | None = None, parallel_mode: str | None = None, parameters_split: Any = None,
        device: Any = "cuda", ub_overlap_ag: bool = False, ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False, ub_bulk_dgrad: bool = False, ub_bulk_wgrad: bool = False,
        ub_name: str | None = None, delay_wgrad_compute: bool = False, symmetric_ar_type: str | None = None,
        save_original_input: bool = False, name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._make(in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, params_dtype,
                   parallel_mode, fuse_wgrad_accumulation)  # fmt: skip

    def _make(
        self, in_features: int, out_features: int, sequence_parallel: bool, tp_group: Any, tp_size: int, bias: bool,
        return_bias: bool, dtype: torch.dtype | None, parallel_mode: str | None, fused: bool,
    ) -> None:  # fmt: skip
        assert parallel_mode in ("column", "row") and not fused
        self.tp_group, self.tp_size, self.use_bias, self.return_bias = tp_group, tp_size, bias, return_bias
        self.sequence_parallel, self.parallel_mode = tp_size > 1 and sequence_parallel, parallel_mode
        is_row = parallel_mode == "row"
        self.in_features = in_features // tp_size if is_row else in_features
        self.out_features = out_features if is_row else out_features // tp_size
        self.weight = torch.nn.Parameter(torch.zeros(self.out_features, self.in_features, dtype=dtype))
        self._mark(self.weight, int(is_row))
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=dtype)) if bias else None
        if bias and is_row:
            self.bias.sequence_parallel = self.sequence_parallel
        elif bias:
            self._mark(self.bias, 0)

    def _mark(self, parameter: Any, axis: int) -> None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, axis, 1

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:  # fmt: skip
        from megatron.core import tensor_parallel as tp

        if self.parallel_mode == "column" and self.sequence_parallel:
            inp = tp.gather_from_sequence_parallel_region(inp, True, group=self.tp_group)
        elif self.parallel_mode == "column":
            inp = tp.copy_to_tensor_model_parallel_region(inp, self.tp_group)
        out = F.linear(inp, self.weight)
        if self.parallel_mode == "row" and self.sequence_parallel:
            out = tp.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        elif self.parallel_mode == "row":
            out = tp.reduce_from_tensor_model_parallel_region(out, self.tp_group)
        if self.return_bias:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class LayerNormLinear(Linear):
    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-5, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None, init_method: Callable[..., Any] | None = None,
        bias: bool = True, normalization: str = "LayerNorm", return_bias: bool = False,
        params_dtype: torch.dtype | None = None, parallel_mode: str | None = None,
        return_layernorm_output: bool = False, return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None, zero_centered_gamma: bool = False, device: Any = "cuda",
        ub_overlap_ag: bool = False, ub_overlap_rs: bool = False, ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False, ub_bulk_dgrad: bool = False, ub_name: str | None = None,
        delay_wgrad_compute: bool = False, symmetric_ar_type: str | None = None, name: str | None = None,
    ) -> None:  # fmt: skip
        _Base.__init__(self)
        self._make(in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, params_dtype,
                   parallel_mode, fuse_wgrad_accumulation)  # fmt: skip
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        make = torch.zeros if zero_centered_gamma else torch.ones
        self.layer_norm_weight = torch.nn.Parameter(make(in_features, dtype=params_dtype))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, dtype=params_dtype))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:  # fmt: skip
        normed = _normed(inp, self.normalization, self.layer_norm_weight, self.layer_norm_bias, self.eps,
                         self.zero_centered_gamma)  # fmt: skip
        return super().forward(normed)


class GroupedLinear(_Base):
    """Subclassed by Megatron at import."""


class DotProductAttention(_Base):
    def __init__(
        self, num_attention_heads: int, kv_channels: int | tuple[int, int], num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None, bottom_right_diagonal: bool | None = None, softcap: float = 0.0,
        sequence_parallel: bool = False, tp_size: int = 1, get_rng_state_tracker: Callable[..., Any] | None = None,
        tp_group: Any = None, layer_number: int | None = None, attention_type: str = "self", cp_group: Any = None,
        cp_global_ranks: Any = None, cp_stream: Any = None, cp_comm_type: str = "p2p",
        softmax_scale: float | None = None, softmax_type: str = "vanilla", return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self, query_layer: Tensor | None = None, key_layer: Tensor | None = None, value_layer: Tensor | None = None,
        attention_mask: Any = None, qkv_format: str | None = None, cu_seqlens_q: Any = None, cu_seqlens_kv: Any = None,
        cu_seqlens_q_padded: Any = None, cu_seqlens_kv_padded: Any = None, max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None, attn_mask_type: str | None = None, window_size: Any = None,
        bottom_right_diagonal: bool | None = None, softcap: float | None = None,
        checkpoint_core_attention: bool = False, core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None, alibi_slopes: Tensor | None = None, fast_zero_fill: bool = True,
        inference_params: Any = None, pad_between_seqs: bool | None = None, fp8_output: bool | None = False,
        bf16_backward: bool | None = False, num_splits: int | None = 1, score_mod: Any = None,
        score_mod_bprop: Any = None, score_mod_tensors: Any = None, score_mod_bprop_tensors: Any = None,
        qkv_layer: Any = None, kv_layer: Any = None, qkv_interleave_dim: int = -3, thd_attention_policies: Any = None,
        thd_attention_policy_dispatch: str = "auto",
    ) -> Tensor:  # fmt: skip
        assert attention_mask is None
        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal" and cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None
            assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
            lengths = cu_seqlens_q.diff().tolist()
            assert query_layer.ndim == 3 and max(lengths) <= max_seqlen_q == max_seqlen_kv
            parts = zip(*(each.split(lengths) for each in (query_layer, key_layer, value_layer)), strict=True)
            return torch.cat([self._attend(*(each[:, None] for each in part)) for part in parts]).squeeze(1)
        assert attn_mask_type == "causal" and qkv_format in (None, "sbhd") and cu_seqlens_q is None
        return self._attend(query_layer, key_layer, value_layer)

    def _attend(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query_layer, key_layer, value_layer))
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale,
                                                 enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip
        return context.permute(2, 0, 1, 3).flatten(2)
