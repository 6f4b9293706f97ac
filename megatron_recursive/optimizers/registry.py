"""Entries in Megatron's own registry of optimizers (``megatron.core.optimizer.emerging_optimizers``, 0.19).

``--optimizer`` looks there for every name but ``adam`` and ``sgd``. There is no function that adds one, so that
``_EMERGING_OPTIMIZERS`` is written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.optimizer import emerging_optimizers as registry
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from megatron_recursive.optimizers.adam_variants import AdamATan2, ELLISAdam

OURS = {"adam_atan2": AdamATan2, "ellis_adam": ELLISAdam}
OUTSIDE = "is_outside_of_layers"  # of a weight: an embedding, a head, a gate or their like


def register() -> None:
    """Add our optimizers to the registry, and keep Muon to matrices of layers and to adapters.

    Megatron keeps word embedding and output layer from Muon by itself, but neither learned positions nor other heads.
    """
    for name, kind in OURS.items():
        registry._EMERGING_OPTIMIZERS[name] = registry.EmergingOptimizerEntry(
            kind, config_to_kwargs=_settings, default_param_overrides={}
        )
    outside = ParamKey(predicate=ParamPredicate(name=OUTSIDE, fn=lambda p: getattr(p, OUTSIDE, False)))
    muon = registry._EMERGING_OPTIMIZERS["muon"]
    apart: dict[ParamKey, dict[str, Any]] = {**muon.default_param_overrides, outside: {"optimizer": "adam"}}
    registry._EMERGING_OPTIMIZERS["muon"] = dataclasses.replace(muon, default_param_overrides=apart)


def _settings(config: Any, model_chunks: Any, pg_collection: Any) -> dict[str, Any]:
    return {
        "lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps,
        "weight_decay": config.weight_decay, "tp_group": pg_collection.tp,
    }  # fmt: skip
