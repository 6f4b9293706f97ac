"""Biases on v stay at zero where the donor has them on q and k alone (``stored_arguments.NO_VALUE_BIAS``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def hold_value_biases(models: Iterable[Any]) -> None:
    """Give the zeros of v's biases no gradient; those that have been trained already go on."""
    for layer in (each for model in models for each in model.modules() if hasattr(each, "linear_qkv")):
        bias, config = layer.linear_qkv.bias, layer.config
        if not bias.requires_grad:
            continue
        group = (config.num_attention_heads // config.num_query_groups + 2) * config.kv_channels
        rows = torch.arange(bias.numel(), device=bias.device) + layer.pg_collection.tp.rank() * bias.numel()
        is_value = rows % group >= group - config.kv_channels
        learns = ~is_value | (bias.detach() != 0)
        bias.register_hook(learns.to(bias.dtype).mul)
