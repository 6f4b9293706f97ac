"""Patch of megatron-core 0.19: FLOPs and theoretical memory count the passes of the plan.

Megatron computes both from ``--num-layers``, each layer once. ``num_floating_point_operations`` and
``report_theoretical_memory`` are looked up as globals of ``megatron.training.training``; there is no hook in the
config. What ``--log-memory-to-tensorboard`` and ``--log-memory-interval`` write is measured by the allocator, and needs
no patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_recursive.accounting import flops_per_token
from megatron_recursive.training import memory_report
from megatron_recursive.training.model_provider import RecursiveGPTModelConfig, model_shape, teacher_flops
from megatron_recursive.training.patches import wrap


def install(config: RecursiveGPTModelConfig) -> None:
    """Replace the counts. Where recursion is off, Megatron's own are right."""
    from megatron.training import training

    recursive = config.recursion.enable_recursive_refinement

    def flops(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        if not recursive:
            return call()
        length = given["args"].seq_length
        each = flops_per_token(model_shape(config, length), config.plan).total + teacher_flops(config, length)
        return each * given["batch_size"] * length

    def memory(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        if not recursive:
            return call()
        return memory_report.report(config, given["args"], given.get("num_microbatches"), given.get("verbose", False))

    wrap(training, "num_floating_point_operations", flops)
    wrap(training, "report_theoretical_memory", memory)
