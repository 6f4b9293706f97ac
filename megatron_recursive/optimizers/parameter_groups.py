"""Which weights of a recursive model have a learning rate or a weight decay of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch.nn import Parameter

from megatron_recursive.models.recursion_core import part_of
from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel
from megatron_recursive.optimizers.registry import OUTSIDE
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plan.added_parameters import added_parameters

ROLES = ("core", "adapter", "head")
Factors = Mapping[str, float]


def rate_factors(
    plan: RecursionPlan, asked: Factors, *, throttle: bool, drawn: Sequence[tuple[float, RecursionPlan]] = ()
) -> dict[str, float]:
    """What the learning rate is multiplied with, by part of the model (:meth:`RecursiveGPTModel.weights_by_part`).

    The core is the layers that the plan applies more than once; ``throttle`` divides its factor by the number of those
    passes that carry gradient. Without factors of their own parts are left out.

    Args:
        asked: factors by role.
        drawn: the plans that steps draw, with their probabilities, of whose passes with gradient the mean counts.
    """
    applied, graded = Counter(p.stack for p in plan.passes), dict.fromkeys(dict(plan.stacks), 0.0)
    for chance, each in drawn or [(1.0, plan)]:
        for p in each.grad_passes:
            graded[p.stack] += chance
    factors = {
        part_of(stack): asked["core"] / (graded[stack] if throttle else 1)
        for stack, count in applied.items()
        if count > 1 and graded[stack]
    }
    factors.update({part: asked[role] for part, role in _added(plan).items()})
    return {part: factor for part, factor in factors.items() if factor != 1.0}


def _added(plan: RecursionPlan) -> dict[str, str]:
    """Role of each part that recursion adds: the last stage has what reads states, the first what joins them."""
    added = [each for each in added_parameters(plan) if each.trained]
    return {each.module.replace("_", " "): "head" if each.stage == "last" else "adapter" for each in added}


def group_overrides(
    models: Iterable[RecursiveGPTModel], config: Any, factors: Factors
) -> dict[ParamKey, dict[str, Any]]:
    """Megatron's overrides of its optimizer config for the model chunks of a rank; marks what is outside of layers.

    Args:
        config: Megatron's OptimizerConfig.
        factors: by part, as :func:`rate_factors` gives them.
    """
    models = list(models)
    parts: dict[str, set[Parameter]] = {}
    heads: set[Parameter] = set()
    for model in models:
        for part, weights in model.weights_by_part().items():
            parts.setdefault(part, set()).update(weights)
            heads |= weights if _added(model.plan).get(part) == "head" else set()
    for weight in heads.union(*(parts.get(part, ()) for part in ("embedding", "output layer"))):
        setattr(weight, OUTSIDE, True)
    overrides: dict[ParamKey, dict[str, Any]] = {_key("heads", heads): {"wd_mult": 0.0}}
    counted = {*factors, *(part_of(stack) for model in models for stack, _ in model.plan.stacks)}
    uses = Counter(weight for part in counted for weight in parts.get(part, ()))  # a norm may serve two stacks
    for part, factor in factors.items():
        rates = {"max_lr": factor * config.lr, "min_lr": factor * config.min_lr, "lr_mult": factor}
        overrides[_key(part, {weight for weight in parts.get(part, ()) if uses[weight] == 1})] = rates
    return overrides


def _key(name: str, weights: set[Parameter]) -> ParamKey:
    return ParamKey(predicate=ParamPredicate(name=name, fn=weights.__contains__))
