"""The layer spec for machines without Transformer Engine: torch's fused attention, norms for sequence parallelism.

Everything else is Megatron's own local spec; Transformer Engine's spec gets no more than the norms that are asked for.
Parameter names and checkpoint keys stay Megatron's; those of norms that its layer lacks are in ``norm_placement.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_recursive.models.documents import Documents, attend_inside, inside_documents
from megatron_recursive.models.norm_placement import NormLayout, place_norms
from megatron_recursive.models.norms import SequenceParallelNorm


class SDPACoreAttention(MegatronModule):
    """Causal self-attention over ``torch.nn.functional.scaled_dot_product_attention``.

    On CUDA by one of its fused kernels (:func:`fused_attention`); inside documents, where they are given. A mask, where
    one is given, is *added* to causality: no mask can open the future. Dropout draws from Megatron's tensor-parallel
    random state, so that ranks drop different heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dropout_p = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [Sq, B, heads, head_dim]; key and value: [Sk, B, groups, head_dim]. Where Sk > Sq, the queries are
                the last Sq positions (cached decoding).
            attention_mask: boolean, broadcastable to [B, heads, Sq, Sk]; True hides a key (Megatron's convention).

        Returns:
            [Sq, B, heads * head_dim].
        """
        documents = packed_seq_params
        assert documents is None or (isinstance(documents, Documents) and attention_mask is None)
        assert attention_bias is None, "an attention bias needs Transformer Engine's attention"
        (s_q, batch, heads, head_dim), (s_k, groups) = query.shape, (key.shape[0], key.shape[2])
        visible = None
        if attention_mask is not None or s_q != s_k:
            # Bottom-right aligned: the last query sees every key.
            visible = torch.ones(s_q, s_k, dtype=torch.bool, device=query.device).tril(s_k - s_q)
            if attention_mask is not None:
                visible = visible & ~attention_mask.bool()
        dropout_p = self.dropout_p if self.training else 0.0
        # Under sequence parallelism the block has already entered this random state.
        fork = dropout_p > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else torch.autograd.profiler.record_function("sdpa"):
            attend: Any = fused_attention if query.is_cuda else F.scaled_dot_product_attention
            if documents is not None:
                inside = attend_inside(documents, query, key, value, attend, dropout_p, scale=self.softmax_scale)
                return inside.reshape(s_q, batch, heads * head_dim)
            context = attend(
                query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), attn_mask=visible,
                is_causal=visible is None, dropout_p=dropout_p, scale=self.softmax_scale, enable_gqa=groups != heads,
            )  # fmt: skip
        return context.permute(2, 0, 1, 3).reshape(s_q, batch, heads * head_dim)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, enable_gqa: bool, **options: Any
) -> Tensor:
    """``scaled_dot_product_attention`` by torch's flash or memory-efficient kernel, never by the slow one.

    Torch takes another kernel without a word where it finds none of these; here that is an error. Grouped queries are
    repeated where only the memory-efficient kernel fits (a mask, fp32), since it knows none.

    Raises:
        RuntimeError: neither kernel takes these shapes, or this type.
    """
    if query.dtype == torch.float64:  # of tests
        kernels = [SDPBackend.MATH]
    else:
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if enable_gqa and (attn_mask is not None or query.dtype == torch.float32):
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        enable_gqa = False
    with sdpa_kernel(kernels):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=enable_gqa, **options)


def layers_of_stages(config: TransformerConfig) -> tuple[int, ...]:
    """How many layers Megatron gives to each pipeline stage."""
    return tuple(get_num_layers_to_build(config, None, rank) for rank in range(config.pipeline_model_parallel_size))


def local_block_spec(
    config: TransformerConfig,
    vp_stage: int | None = None,
    norms: NormLayout = NormLayout(),  # noqa: B008  (it is frozen)
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, for CPU and for GPUs without Transformer Engine."""
    spec = copy.deepcopy(
        get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = SequenceParallelNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelNorm
    place_norms(layer, config, norms)
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=SequenceParallelNorm)


def engine_layer_spec(spec: ModuleSpec, config: TransformerConfig, norms: NormLayout) -> ModuleSpec:
    """Megatron's spec of Transformer Engine's modules, with the norms of a layout and attention inside documents."""
    spec = copy.deepcopy(spec)
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = inside_documents(attention.core_attention)
    if norms != NormLayout():
        place_norms(spec.submodules, config, norms, engine=True)
    return spec
