"""Patch of megatron-core 0.19: ``num_floating_point_operations`` counts the passes of the plan.

Megatron computes a step's FLOPs from ``--num-layers``, once forward and once backward. The function is looked up as a
global of ``megatron.training.training``; there is no hook in the config.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron_recursive.accounting import flops_per_token
from megatron_recursive.training.model_provider import RecursiveGPTModelConfig, model_shape


def install(model_config: RecursiveGPTModelConfig) -> None:
    """Replace the count, unless recursion is off and Megatron's own is right."""
    from megatron.training import training

    original = inspect.unwrap(training.num_floating_point_operations)
    training.num_floating_point_operations = original
    if not model_config.recursion.enable_recursive_refinement:
        return

    def num_floating_point_operations(args: Any, batch_size: int, *_: Any, **__: Any) -> float:
        per_token = flops_per_token(model_shape(model_config, args.seq_length), model_config.plan)
        return per_token.total * batch_size * args.seq_length

    num_floating_point_operations.__wrapped__ = original  # type: ignore[attr-defined]
    training.num_floating_point_operations = num_floating_point_operations
