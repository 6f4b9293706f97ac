"""Documents that share a sequence, and attention inside each of them; no mask of S x S is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.varlen import varlen_attn

_TAKES = inspect.signature(varlen_attn).parameters
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _TAKES else {}  # since torch 2.12


@dataclass
class Documents(PackedSeqParams):
    """Where the documents of a micro-batch lie, sample behind sample; what Megatron hands down to the attention.

    States stay [S, B, H], and rotary positions, which are relative, go on over documents. So ``qkv_format`` is none of
    Megatron's, and an attention that knows no documents refuses it.
    """

    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, ids_BS: Tensor | None) -> Documents | None:
        """Of document ids; None where every sample is one document. On a GPU it waits for the ids, once a micro-batch.

        ``ids_BS``: equal for neighbours of the same document; None is one document a sample.
        """
        if ids_BS is None:
            return None
        begins_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        begins_BS[:, 1:] = ids_BS[:, 1:] != ids_BS[:, :-1]
        starts_D = begins_BS.flatten().cpu().nonzero().squeeze(1)  # the only wait: lengths are needed here too
        if len(starts_D) == len(ids_BS):
            return None
        bounds = torch.cat([starts_D, starts_D.new_tensor([ids_BS.numel()])]).int()
        there = bounds.to(ids_BS.device, non_blocking=True)
        return cls("documents", there, there, max_seqlen_q=ids_BS.shape[1], max_seqlen_kv=ids_BS.shape[1],
                   lengths=tuple(bounds.diff().tolist()))  # fmt: skip

    def places(self, batch: int) -> Tensor:
        """The place of each token in its document, [B, S] from 0."""
        bounds = self.cu_seqlens_q.long()
        first_T = bounds[:-1].repeat_interleave(bounds.diff())
        return (torch.arange(len(first_T), device=first_T.device) - first_T).view(batch, -1)


def attend_inside(
    documents: Documents, query: Tensor, key: Tensor, value: Tensor, attend: Callable[..., Tensor], dropout_p: float,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Causal attention of [S, B, heads, head_dim] inside each document.

    On CUDA by torch's flash attention for variable lengths where that fits (16 bits, no dropout, head_dim a multiple of
    8), elsewhere by ``attend``, which is like ``scaled_dot_product_attention``, of one document after the other.
    """
    batch, grouped = query.shape[1], key.shape[2] != query.shape[2]
    q, k, v = (_samples_in_a_row(each).transpose(0, 1)[None] for each in (query, key, value))
    asked = SDPAParams(q, k, v, None, dropout_p, True, grouped)
    if query.is_cuda and dropout_p == 0 and query.shape[3] % 8 == 0 and can_use_flash_attention(asked):
        q, k, v = (each[0].transpose(0, 1) for each in (q, k, v))
        context_THD = flash_inside(documents, q, k, v, options["scale"])
    else:
        parts = zip(*(each.split(documents.lengths, 2) for each in (q, k, v)), strict=True)
        done = [attend(*part, attn_mask=None, is_causal=True, dropout_p=dropout_p, enable_gqa=grouped, **options)
                for part in parts]  # fmt: skip
        context_THD = torch.cat(done, 2)[0].transpose(0, 1)
    return context_THD.unflatten(0, (batch, -1)).transpose(0, 1)


def flash_inside(documents: Documents, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The same of [tokens, heads, head_dim] in one kernel, each key serving its group of queries."""
    if key.shape[1] != query.shape[1] and not _GROUPED:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    longest, bounds = max(documents.lengths), documents.cu_seqlens_q
    context: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0),
                               **_GROUPED)  # fmt: skip
    return context


@cache
def inside_documents(attention: Any) -> Any:
    """Transformer Engine's attention (Megatron's wrapper), which is given documents as one packed sequence."""

    class DocumentAttention(attention):
        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any,
            packed_seq_params: PackedSeqParams | None = None, **kwargs: Any,
        ) -> Tensor:  # fmt: skip
            given: tuple[Tensor, ...] = (query, key, value)
            packed = packed_seq_params
            if isinstance(packed_seq_params, Documents):
                bounds, most = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
                packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=most, max_seqlen_kv=most)
                given = tuple(_samples_in_a_row(each) for each in given)
            context: Tensor = super().forward(*given, attention_mask, *args, packed_seq_params=packed, **kwargs)
            if packed is packed_seq_params:
                return context
            return context.reshape(query.shape[1], query.shape[0], -1).transpose(0, 1)

    return DocumentAttention


def _samples_in_a_row(tensor_SBHD: Tensor) -> Tensor:
    return tensor_SBHD.transpose(0, 1).flatten(0, 1)
