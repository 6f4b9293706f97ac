"""The patch of megatron-core 0.19 that puts recursive models under Megatron's training.

``get_forward_backward_func`` looks its schedules up as globals of ``schedules`` each time it is called, so that
replacing them there reaches training and evaluation. On several pipeline stages a recursive model takes the ring; on
one it takes Megatron's own schedule. Either way a training step begins by what :mod:`.readiness` says, and has the plan
that ``plan_of_step`` gives. Models without a recursion plan of several passes go to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_attr_wrapped_model

from megatron_recursive.pipeline.readiness import begin_step
from megatron_recursive.pipeline.ring_schedule import ring_forward_backward
from megatron_recursive.plan import RecursionPlan

PlanOfStep = Callable[[bool], RecursionPlan | None]  # of whether it is forward-only; None: the model's own
NAME = "forward_backward_pipelining_without_interleaving"
ONE_STAGE = "forward_backward_no_pipelining"


def install(plan_of_step: PlanOfStep = lambda forward_only: None) -> None:
    """Route recursive models to their schedules. A second call counts, and the first one no longer."""
    for name, ours in ((NAME, ring_forward_backward), (ONE_STAGE, None)):
        original = getattr(schedules, name)
        original = getattr(original, "__wrapped__", original)
        setattr(schedules, name, _dispatcher(original, ours, plan_of_step))


def _dispatcher(
    original: Callable[..., Any], ours: Callable[..., Any] | None, plan_of_step: PlanOfStep
) -> Callable[..., Any]:
    def forward_backward(*, model: Any, forward_only: bool = False, **kwargs: Any) -> Any:
        if not _is_recursive(model):
            return original(model=model, forward_only=forward_only, **kwargs)
        if not forward_only:
            begin_step(model[0] if isinstance(model, list) else model)
        plan = plan_of_step(forward_only)
        if ours is not None:
            return ours(model=model, forward_only=forward_only, **{"plan": plan, **kwargs})
        if plan is not None:
            kwargs["forward_step_func"] = partial(kwargs["forward_step_func"], plan=plan)
        return original(model=model, forward_only=forward_only, **kwargs)

    forward_backward.__wrapped__ = original  # type: ignore[attr-defined]
    return forward_backward


def _is_recursive(model: Any) -> bool:
    first = model[0] if isinstance(model, list) else model
    try:
        return not get_attr_wrapped_model(first, "plan").is_plain
    except RuntimeError:  # no such attribute
        return False
