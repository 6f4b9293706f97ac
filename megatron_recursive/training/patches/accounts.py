"""Patch of megatron-core 0.19: FLOPs and theoretical memory count the passes of the plan.

Megatron computes both from ``--num-layers``, each layer once. ``num_floating_point_operations`` and
``report_theoretical_memory`` are looked up as globals of ``megatron.training.training``; there is no hook in the
config. What ``--log-memory-to-tensorboard`` and ``--log-memory-interval`` write is measured by the allocator, and needs
no patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_recursive.plan import StepPlans
from megatron_recursive.training import memory_report
from megatron_recursive.training.model_provider import RecursiveGPTModelConfig, training_flops
from megatron_recursive.training.patches import wrap


def install(config: RecursiveGPTModelConfig, plans: StepPlans) -> None:
    """Replace the counts, those of a step by its own of ``plans``. Where recursion is off, Megatron's are right."""
    from megatron.training import training

    recursive = config.recursion.enable_recursive_refinement
    steps: dict[int, float] = {}  # FLOPs of the steps since Megatron's last line, by iteration

    def flops(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        if not recursive:
            return call()
        run = given["args"]
        iteration, length = run.curr_iteration, run.seq_length
        if iteration in steps:  # asked again for the throughput of the line, which is of all its steps
            mean = sum(steps.values()) / len(steps)
            if (iteration + 1) % run.log_interval == 0:
                steps.clear()
            return mean
        plan = plans.plan_at(iteration)
        tokens = given["batch_size"] * length
        steps[iteration] = training_flops(config, length, {plan: 1}).total * tokens
        run.flops_spent = getattr(run, "flops_spent", run.num_floating_point_operations_so_far) + steps[iteration]
        return steps[iteration]

    def memory(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        if not recursive:
            return call()
        return memory_report.report(config, given["args"], given.get("num_microbatches"), given.get("verbose", False))

    wrap(training, "num_floating_point_operations", flops)
    wrap(training, "report_theoretical_memory", memory)
