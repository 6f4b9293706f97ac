"""The patch of megatron-core 0.19 that puts the ring under Megatron's training.

``get_forward_backward_func`` looks ``forward_backward_pipelining_without_interleaving`` up as a global of ``schedules``
each time it is called, so that replacing it there reaches training and evaluation. Models without a recursion plan of
several passes go to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_attr_wrapped_model

from megatron_recursive.pipeline.ring_schedule import ring_forward_backward

NAME = "forward_backward_pipelining_without_interleaving"


def install() -> None:
    """Route recursive models on several pipeline stages to the ring. A second call changes nothing."""
    original = getattr(schedules, NAME)
    setattr(schedules, NAME, _dispatcher(getattr(original, "__wrapped__", original)))


def _dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_backward(*, model: Any, **kwargs: Any) -> Any:
        return (ring_forward_backward if _is_recursive(model) else original)(model=model, **kwargs)

    forward_backward.__wrapped__ = original  # type: ignore[attr-defined]
    return forward_backward


def _is_recursive(model: Any) -> bool:
    first = model[0] if isinstance(model, list) else model
    try:
        return not get_attr_wrapped_model(first, "plan").is_plain
    except RuntimeError:  # no such attribute
        return False
