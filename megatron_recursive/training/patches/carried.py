"""Patch of megatron-core 0.19: a training step may go on from the states of the one before (supervision_steps.py).

``train_step`` is a global of ``megatron.training.training``. It reads a new global batch each time, and its caller
counts one as consumed; there is no hook between. The wrapper stands around one step: it puts a memory below the data
iterator at the first one, and corrects ``consumed_train_samples`` by what Megatron is about to add too much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_recursive.training.patches import wrap
from megatron_recursive.training.supervision_steps import SupervisionSteps


def install() -> None:
    """Let each step see the one before. Without --num-supervision-steps nothing changes."""
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args, training

    steps: SupervisionSteps | None = None

    def train_step(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        nonlocal steps
        run = get_args()
        if getattr(run, "num_supervision_steps", 1) == 1:
            return call()
        steps = steps or SupervisionSteps(run, unwrap_model(given["model"][0]), given["data_iterator"])
        return steps.step(given["iteration"], call)

    wrap(training, "train_step", train_step)
