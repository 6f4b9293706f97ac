"""A model's parameters as the whole model names and holds them, whichever layout spreads them over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

EMBEDDING_STD = 0.15

Tensors = dict[str, Tensor]

# Transformer Engine's layers hold the norm of a linear layer's input in that layer; here it has Megatron's local name.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def unwrapped(module: Any) -> Any:
    """The model inside DDP and Float16Module."""
    while hasattr(module, "module"):
        module = module.module
    return module


def named_parameters(module: Any) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters, under the names that a model on one pipeline stage gives them."""
    model = unwrapped(module)
    return {whole_name(name, model): parameter for name, parameter in model.named_parameters()}


def whole_name(name: str, model: Any) -> str:
    """Stages count their layers from 0, and the last one holds a copy of a tied embedding."""
    layers = "decoder.layers."
    if name.startswith(layers):
        index, _, rest = name.removeprefix(layers).partition(".")
        for fused, apart in FUSED_NORMS.items():
            rest = rest.replace(fused, apart)
        return f"{layers}{model.decoder.layers[int(index)].layer_number - 1}.{rest}"
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


def fill_weights(model: Any) -> None:
    """Weights that depend on the parameter's name alone, not on the layout; none is zero, so every path counts."""
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            pieces = _pieces(name, model.config)
            shape = list(parameter.shape)
            if getattr(parameter, "tensor_model_parallel", False):
                shape[parameter.partition_dim] *= model.config.tensor_model_parallel_size
            generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
            full = EMBEDDING_STD * torch.randn(shape, generator=generator)
            if "norm" in name and name.endswith("weight") and not model.config.layernorm_zero_centered_gamma:
                full += 1.0
            if not parameter.requires_grad and getattr(model.config, "norm_weights", "") == "ones":
                full.fill_(1.0)
            parameter.copy_(_shard(full, parameter, pieces))


def _pieces(name: str, config: Any) -> int:
    """Megatron shards the two halves of a gated MLP's first matrix apart."""
    return 2 if config.gated_linear_unit and "linear_fc1" in name else 1


def _shard(full: Tensor, parameter: Any, pieces: int) -> Tensor:
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    axis = parameter.partition_dim
    return torch.cat([piece.chunk(size, axis)[rank] for piece in full.chunk(pieces, axis)], axis)


def gathered(local: Mapping[str, Tensor], module: Any) -> Tensors:
    """Tensors shaped like the parameters of the same names, whole. Replicated ones are this rank's own."""
    from megatron.core import parallel_state

    group, parameters = parallel_state.get_tensor_model_parallel_group(), named_parameters(module)
    full = {}
    for name, tensor in local.items():
        parameter, pieces = parameters[name], _pieces(name, unwrapped(module).config)
        if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
            shards = [torch.empty_like(tensor) for _ in range(group.size())]
            dist.all_gather(shards, tensor.contiguous(), group=group)
            axis = parameter.partition_dim
            halves = zip(*(shard.chunk(pieces, axis) for shard in shards), strict=True)
            tensor = torch.cat([torch.cat(half, axis) for half in halves], axis)
        full[name] = tensor.detach().clone()
    return full


def full_gradients(wrapped: Any) -> Tensors:
    """``main_grad`` of every trained parameter after the schedule, gathered over tensor- and data-parallel ranks."""
    if wrapped.ddp_config.use_distributed_optimizer:
        for buffer in wrapped.buffers:
            for bucket in buffer.buckets:  # each data-parallel rank has reduced its own part
                shards = list(bucket.grad_data.chunk(buffer.data_parallel_world_size))
                own = shards[dist.get_rank(buffer.data_parallel_group)].clone()
                whole = [torch.empty_like(own) for _ in shards]
                dist.all_gather(whole, own, group=buffer.data_parallel_group)
                bucket.grad_data.copy_(torch.cat(whole))
    return gathered({name: p.main_grad for name, p in named_parameters(wrapped).items() if p.requires_grad}, wrapped)
