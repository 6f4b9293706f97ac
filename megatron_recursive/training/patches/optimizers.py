"""Patch of megatron-core 0.19: the optimizer of a run knows the parts of a recursive model.

``megatron.training.training`` calls ``get_megatron_optimizer`` as a global of its own, with overrides for parameter
groups to which it has no hook. The wrapper adds ours (``optimizers/parameter_groups.py``), and under ``--ema-decay``
puts an average beside what was built (``optimizers/weight_average.py``). Nor has the scheduler that it gets from
``get_optimizer_param_scheduler`` one for the rate of a model that has grown (``plan/growth.py``).
SGD gets what fills its state before a checkpoint is read, which Megatron gives to all optimizers but that one.
``ft_integration.setup`` reads the command line a second time with Megatron's own parser, which knows no
``--optimizer`` of ours: it is called where it has work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_recursive.optimizers import registry
from megatron_recursive.optimizers.parameter_groups import group_overrides
from megatron_recursive.optimizers.weight_average import WeightAverage, averages_of
from megatron_recursive.plan.growth import Growth
from megatron_recursive.training.patches import wrap


def install(args: argparse.Namespace, growth: Growth) -> list[WeightAverage]:
    """Wrap what a run calls to get its optimizer and schedule, and add our optimizers to Megatron's registry.

    Returns:
        A list that will hold the run's averages of weights.
    """
    from megatron.training import ft_integration, training

    registry.register()
    averages: list[WeightAverage] = []

    def build(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        ours = group_overrides(unwrap_model(given["model_chunks"]), given["config"], args.rate_factors)
        given["config_overrides"] = {**(given["config_overrides"] or {}), **ours}
        optimizer = call()
        for each in getattr(optimizer, "chained_optimizers", [optimizer]):
            if type(each.optimizer).__name__ in ("SGD", "FusedSGD") and each.init_state_fn is None:
                each.init_state_fn = _momenta
        averages[:] = [] if args.ema_decay is None else averages_of(optimizer, args.ema_decay)
        return optimizer

    def schedule(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        scheduler = call()
        scheduled = scheduler.get_lr
        scheduler.begun = 0  # iterations, of the checkpoint that is read

        def rate(group: dict[str, Any]) -> float:  # of the next iteration; the scheduler counts samples, and not all
            factor: float = growth.rate_factor(getattr(args, "curr_iteration", scheduler.begun - 1) + 1)
            return factor * scheduled(group)

        if growth.config.grow_rewarm_iters:
            scheduler.get_lr = rate
        return scheduler

    wrap(training, "get_megatron_optimizer", build)
    wrap(training, "get_optimizer_param_scheduler", schedule)
    wrap(ft_integration, "setup", lambda call, given: call() if args.enable_ft_package else None)
    return averages


def _momenta(optimizer: torch.optim.SGD, config: Any = None) -> None:
    """A state for each parameter, as a step leaves it."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
