"""``--keep-best``: the checkpoint of the lowest held-out loss, in ``best`` below --save.

``best`` is a checkpoint root like --save itself, and can be loaded like it. The one before goes when the new one is
complete. ``best.json`` in it tells its loss to a resumed run; to one that starts at iteration 0 it tells nothing.
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
from megatron_recursive.training.checkpoint_folders import BEST

RECORD = "best.json"
SAVED = ("model", "optimizer", "opt_param_scheduler", "checkpointing_context", "train_data_iterator")


def held_out_by(run: argparse.Namespace) -> dict[str, Any]:
    """The flags that say which data an evaluation reads."""
    apart = run.valid_data_path or run.valid_chat_data
    of_training = "split", "data_path", "chat_data", "data_args_path", "per_split_data_args_path"
    names = "seed", "valid_data_path", "valid_chat_data", *(() if apart else of_training)
    return {name: getattr(run, name) for name in names}


class BestCheckpoint:
    """What the best one of a run is, on every rank."""

    loss: float | None = None  # not read yet

    def evaluated(
        self, run: argparse.Namespace, iteration: int, sets: Sequence[Mapping[str, Any]], trained: Mapping[str, Any]
    ) -> None:
        """Save if the mean held-out loss of all sets, which the last rank knows, is the lowest. Collective.

        ``trained``: the arguments of Megatron's ``train``.
        """
        from megatron.training import training

        root, losses = Path(run.save) / BEST, [float(values["lm loss"]) for values in sets if values]
        samples = "all" if run.full_validation else run.eval_iters * run.eval_global_batch_size
        data = held_out_by(run)
        if self.loss is None:
            there = run.iteration and (root / RECORD).is_file()
            before = json.loads((root / RECORD).read_text(encoding="utf-8")) if there else {}
            same = before.get("samples") == samples and before.get("data", data) == data
            self.loss = before["lm loss"] if before and same else torch.inf
            if before and self.loss == torch.inf and run.rank == 0:
                console.say(f"{root} has a loss of other held-out samples, with which none is compared")
        mean = sum(losses) / len(losses) if losses else torch.inf
        device = next(trained["model"][0].parameters()).device
        found = torch.tensor([mean if mean < self.loss else torch.inf], device=device)
        torch.distributed.broadcast(found, run.world_size - 1)
        if torch.isinf(found):
            return
        self.loss, kept, run.save = float(found), run.save, str(root)
        try:
            training.save_checkpoint(
                iteration, **{name: trained[name] for name in SAVED},
                num_floating_point_operations_so_far=getattr(run, "flops_spent", 0),
                preprocess_common_state_dict_fn=training.preprocess_common_state_dict,
            )  # fmt: skip
        finally:
            run.save = kept
        if run.rank == 0:
            with replacing(root / RECORD) as (partial,):
                record = {"iteration": iteration, "lm loss": self.loss, "samples": samples, "data": data}
                partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
            for old in {*root.glob("iter_[0-9]*")} - {root / f"iter_{iteration:07d}"}:
                shutil.rmtree(old, ignore_errors=True)
            console.say(f"lowest held-out loss so far, {self.loss:.4f} at iteration {iteration}: kept in {root}")
