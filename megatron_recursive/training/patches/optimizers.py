"""Patch of megatron-core 0.19: the optimizer of a run knows the parts of a recursive model.

``megatron.training.training`` calls ``get_megatron_optimizer`` as a global of its own, with overrides for parameter
groups to which it has no hook. The wrapper adds ours (``optimizers/parameter_groups.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron.core.utils import unwrap_model

from megatron_recursive.optimizers import registry
from megatron_recursive.optimizers.parameter_groups import group_overrides
from megatron_recursive.training.patches import wrap


def install(args: argparse.Namespace) -> None:
    """Wrap the ``get_megatron_optimizer`` that a run calls, and add our optimizers to Megatron's registry."""
    from megatron.training import training

    registry.register()

    def build(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        ours = group_overrides(unwrap_model(given["model_chunks"]), given["config"], args.rate_factors)
        given["config_overrides"] = {**(given["config_overrides"] or {}), **ours}
        return call()

    wrap(training, "get_megatron_optimizer", build)
