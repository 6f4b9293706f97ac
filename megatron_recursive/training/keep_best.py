"""``--keep-best``: the checkpoint of the lowest held-out loss, in ``best`` below --save.

``best`` is a checkpoint root like --save itself, and can be loaded like it. The one before goes when the new one is
complete. ``best.json`` beside it tells its loss to a resumed run; to one that starts at iteration 0 it tells nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_recursive.data.files import replacing
from megatron_recursive.training import console

FOLDER, RECORD = "best", "best.json"


class BestCheckpoint:
    """What the best one of a run is, on every rank."""

    def __init__(self) -> None:
        self._loss: float | None = None  # not read yet

    def evaluated(
        self, run: argparse.Namespace, iteration: int, sets: Sequence[Mapping[str, Any]], trained: Mapping[str, Any]
    ) -> None:
        """Save if the mean held-out loss of all sets is the lowest. ``trained``: the arguments of Megatron's ``train``.

        Collective. The last rank alone knows the losses.
        """
        losses = [float(values["lm loss"]) for values in sets if values]
        mean, device = sum(losses) / len(losses) if losses else torch.inf, next(trained["model"][0].parameters()).device
        found = torch.tensor([mean], device=device)
        torch.distributed.broadcast(found, run.world_size - 1)
        loss, root = float(found), Path(run.save) / FOLDER
        if self._loss is None:
            self._loss = _recorded(root) if run.iteration else torch.inf
        if not loss < self._loss:
            return
        self._loss = loss
        self._save(run, iteration, root, trained)
        if run.rank == 0:
            with replacing(root / RECORD) as (partial,):
                partial.write_text(json.dumps({"iteration": iteration, "lm loss": loss}) + "\n", encoding="utf-8")
            for old in root.glob("iter_[0-9]*"):
                if old.name != f"iter_{iteration:07d}":
                    shutil.rmtree(old, ignore_errors=True)
            console.say(f"lowest held-out loss so far, {loss:.4f} at iteration {iteration}: kept in {root}")

    def _save(self, run: argparse.Namespace, iteration: int, root: Path, trained: Mapping[str, Any]) -> None:
        """By Megatron's own save, to another place."""
        from megatron.training import training

        names = ("model", "optimizer", "opt_param_scheduler", "checkpointing_context", "train_data_iterator")
        kept, run.save = run.save, str(root)
        try:
            training.save_checkpoint(
                iteration, **{name: trained[name] for name in names},
                num_floating_point_operations_so_far=getattr(run, "flops_spent", 0),
                preprocess_common_state_dict_fn=training.preprocess_common_state_dict,
            )  # fmt: skip
        finally:
            run.save = kept


def _recorded(root: Path) -> float:
    try:
        return float(json.loads((root / RECORD).read_text(encoding="utf-8"))["lm loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return torch.inf
