"""When DDP may reduce a bucket of gradients: when each of its weights has had the last backward of the step.

Megatron 0.19 counts how often a gradient arrives in the first step, and takes a bucket for ready at the same count in
every later one. A shared weight gets a gradient from every pass that carries one, and how many do may change from step
to step. So here a weight is ready once a step: when its gradient arrives in the backward of the last micro-batch, and
no use of it is open any more. A bucket that never gets there (a pass whose result nobody reads) is reduced at the
step's end, as Megatron does in its first step.
"""

from __future__ import annotations

from typing import Any

from megatron.core.utils import get_attr_wrapped_model
from torch.nn import Parameter

from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel


def begin_step(wrapped: Any) -> None:
    """Before the schedule of a training step. Without overlapped gradient reduction there is nothing to do."""
    model: RecursiveGPTModel = get_attr_wrapped_model(wrapped, "plan", return_model_obj=True)
    model.uses.open.clear()
    for group in getattr(wrapped, "bucket_groups", ()):
        if not isinstance(group.__dict__.get("register_grad_ready"), _Readiness):
            group.register_grad_ready = _Readiness(group, model)
        group.register_grad_ready.begin_step()


class _Readiness:
    """Stands in for ``register_grad_ready`` of a bucket group, which DDP calls with each gradient that arrives."""

    def __init__(self, group: Any, model: RecursiveGPTModel) -> None:
        self.group, self.uses = group, model.uses
        parts = model.weights_by_part()
        self.parts = {weight: [name for name, weights in parts.items() if weight in weights] for weight in group.params}
        assert all(self.parts.values()), "a weight that no part of the model has: see weights_by_part"

    def begin_step(self) -> None:
        self.ready: set[Parameter] = set()
        self.group.is_first_batch = True  # finish_grad_sync starts what was not started

    def __call__(self, weight: Parameter, force_all_reduce: bool | None = False) -> None:
        if not self.group.is_last_microbatch or any(self.uses.open[part] for part in self.parts[weight]):
            return
        self.ready.add(weight)
        if len(self.ready) == len(self.group.params):
            self.group.start_grad_sync(force_all_reduce=force_all_reduce)
            self.group.is_first_batch = False  # finish_grad_sync waits for it
