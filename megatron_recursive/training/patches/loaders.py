"""Patch of megatron-core 0.19: where the data of a resumed run begins.

Megatron takes a checkpoint of a later iteration with no samples consumed for an old one, which did not count them, and
skips as many batches; a run of carried steps that stopped within its first batch has consumed none. Its samplers refuse
to begin behind the last sample, of a run too that is at its last iteration and reads no more, but has evaluations to
make (that of ``cyclic`` has no last one). Both functions are globals of ``megatron.training.training`` without a hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_recursive.training.patches import wrap


def install() -> None:
    from megatron.training import get_args, training

    def loaders(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        run = get_args()
        iteration = run.iteration
        try:
            if run.consumed_train_samples == 0 and getattr(run, "num_supervision_steps", 1) > 1:
                run.iteration = 0
            return call()
        finally:
            run.iteration = iteration

    def loader(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        run, dataset = get_args(), given["dataset"]
        ended = run.iteration and run.iteration >= run.train_iters
        if ended and dataset is not None and run.dataloader_type == "single":
            given["consumed_samples"] = max(0, min(given["consumed_samples"], len(dataset) - 1))
        return call()

    wrap(training, "build_train_valid_test_data_loaders", loaders)
    wrap(training, "build_pretraining_data_loader", loader)
