"""The patch of megatron-core 0.19 that puts recursive models under Megatron's training.

``get_forward_backward_func`` looks its schedules up as globals of ``schedules`` each time it is called, so that
replacing them there reaches training and evaluation. On several pipeline stages a recursive model takes the ring; on
one it takes Megatron's own schedule. Either way a training step begins by what :mod:`.readiness` says, and has the plan
that ``plan_of_step`` gives; a step of an evaluation is run at ``eval_depths`` too. Models without a recursion plan of
several passes go to the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_attr_wrapped_model

from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel
from megatron_recursive.pipeline.evaluation_depths import evaluate_at_depths
from megatron_recursive.pipeline.readiness import begin_step
from megatron_recursive.pipeline.ring_schedule import ring_forward_backward
from megatron_recursive.plan import RecursionPlan

# Of the model, and whether the step is forward-only; None: the model's own plan.
PlanOfStep = Callable[[RecursiveGPTModel, bool], RecursionPlan | None]
NAME = "forward_backward_pipelining_without_interleaving"
ONE_STAGE = "forward_backward_no_pipelining"


def install(
    plan_of_step: PlanOfStep = lambda model, forward_only: None, eval_depths: Sequence[int] = ()
) -> None:
    """Route recursive models to their schedules. A second call counts, and the first one no longer."""
    for name, ours in ((NAME, ring_forward_backward), (ONE_STAGE, None)):
        original = getattr(schedules, name)
        original = getattr(original, "__wrapped__", original)
        ours = ours or partial(_on_one_stage, original)
        setattr(schedules, name, _dispatcher(original, ours, plan_of_step, tuple(eval_depths)))


def _dispatcher(
    original: Callable[..., Any], ours: Callable[..., Any], plan_of_step: PlanOfStep, eval_depths: Sequence[int]
) -> Callable[..., Any]:
    def forward_backward(*, model: Any, forward_only: bool = False, **kwargs: Any) -> Any:
        if not _is_recursive(model):
            return original(model=model, forward_only=forward_only, **kwargs)
        wrapped = model[0] if isinstance(model, list) else model
        if not forward_only:
            begin_step(wrapped)
        inner = get_attr_wrapped_model(wrapped, "plan", return_model_obj=True)
        plan = plan_of_step(inner, forward_only)
        run = partial(ours, model=model, forward_only=forward_only)
        if forward_only and eval_depths:
            return evaluate_at_depths(run, inner.plan_of_step(plan), eval_depths, **kwargs)
        return run(**{"plan": plan, **kwargs})

    forward_backward.__wrapped__ = original  # type: ignore[attr-defined]
    return forward_backward


def _on_one_stage(original: Callable[..., Any], *, plan: RecursionPlan | None, **kwargs: Any) -> Any:
    if plan is not None:
        kwargs["forward_step_func"] = partial(kwargs["forward_step_func"], plan=plan)
    return original(**kwargs)


def _is_recursive(model: Any) -> bool:
    first = model[0] if isinstance(model, list) else model
    try:
        return not get_attr_wrapped_model(first, "plan").is_plain
    except RuntimeError:  # no such attribute
        return False
