"""Patch of megatron-core 0.19: checkpoints of another model are refused in words, and faults leave the last good one.

``megatron.training.training`` calls ``load_checkpoint`` and ``save_checkpoint`` as globals of its own, without a hook.
Before any weight is read, the first wrapper checks the checkpoint (``training/checkpointing.py``) and tells the model
that one is being read (``models/checkpoint_keys.py``). The second leaves run.json beside it
(``training/run_record.py``) and tells the reader. Both turn what goes wrong into one sentence that names the last good
checkpoint. Megatron writes its tracker file in place, so that a kill at the wrong moment would leave it empty; here it
is written beside and renamed. And at its first save each rank would spawn a process for the queue that the results of
writers go through, which imports everything anew: six seconds and half a gigabyte. The writers of a synchronous save
are threads, for which a queue of this process does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron.core.utils import unwrap_model
from megatron.training import get_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_recursive.accounting import count_parameters
from megatron_recursive.data.files import CannotWrite
from megatron_recursive.errors import DISK_FULL, UserError
from megatron_recursive.models.checkpoint_integrity import (
    COMPLETE,
    LIMIT_BYTES,
    MANIFEST,
    TRACKER,
    advise_other,
    check_integrity,
)
from megatron_recursive.models.checkpoint_keys import reading_checkpoint
from megatron_recursive.models.stored_arguments import DONOR, NO_VALUE_BIAS
from megatron_recursive.optimizers.weight_average import WeightAverage, read_where_stored
from megatron_recursive.plan import StepPlans
from megatron_recursive.training import run_record
from megatron_recursive.training.checkpoint_folders import checkpoint_to_read, last_complete, reading_only, saving_root
from megatron_recursive.training.checkpointing import cause_of, check_checkpoint, reason_of
from megatron_recursive.training.data_stream import is_stream, share_position
from megatron_recursive.training.lora import refuse_blind_adapter
from megatron_recursive.training.model_provider import RecursiveGPTModelConfig, model_shape
from megatron_recursive.training.optimizer_state import choose_format
from megatron_recursive.training.patches import wrap
from megatron_recursive.training.patches.adam import tell_step, torch_adam_mended
from megatron_recursive.training.progress import Progress
from megatron_recursive.training.schedule_check import groups_of_the_checkpoint
from megatron_recursive.training.value_biases import hold_value_biases

OTHER_DEVICE = ("RNG state is wrong size", "CPUGeneratorImplState")  # what torch says of another device's random state
STATE_BYTES = 20  # a parameter with its fp32 copy, Adam's moments and --ema-decay's average, at most
FULL_BYTES = 10**6  # a disk with less room was filled by a save


def install(
    args: argparse.Namespace, config: RecursiveGPTModelConfig, progress: Progress, averages: Sequence[WeightAverage]
) -> None:
    """Wrap the ``load_checkpoint`` and ``save_checkpoint`` that ``pretrain`` calls, and the writing of the tracker."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import checkpointing, training

    if not args.async_save:
        filesystem_async._results_queue = queue.Queue()
    asked, parameters = args.verify_integrity, count_parameters(model_shape(config, args.seq_length), config.plan).held
    choose_format(args, parameters)
    if asked is None:  # the same answer on every rank, before there is a file to measure
        args.verify_integrity = parameters * STATE_BYTES <= LIMIT_BYTES
    record = run_record.record_of(args, config) if args.save is not None else {}
    wrap(training, "load_checkpoint", partial(_load, config, asked, averages))
    wrap(training, "save_checkpoint", partial(_save, record, config.step_plans(args), progress))
    original = checkpointing.maybe_msc
    checkpointing.maybe_msc = FilesWithAtomicTracker(getattr(original, "__wrapped__", original))


def _load(
    config: RecursiveGPTModelConfig, verify: bool | None, averages: Sequence[WeightAverage], call: Callable[[], Any],
    given: dict[str, Any],
) -> Any:  # fmt: skip
    """``verify`` is what the flags say: True needs a manifest, None checks one that is there, False does not look."""
    run, optimizer, scheduler = get_args(), given["optimizer"], given["opt_param_scheduler"]
    writes_manifest = run.verify_integrity
    folder, from_plain_gpt = checkpoint_to_read(run)
    common, plans = dict[str, Any](), config.step_plans(run)
    if folder is not None:
        if verify is not False:
            check_integrity(folder, needed=verify is True)
        common = check_checkpoint(folder, plans.growth, scheduler, run, from_plain_gpt=from_plain_gpt)
    fresh_adapters = bool(common) and getattr(common["args"], "lora_rank", None) is None
    try:
        run.verify_integrity = False  # it is done, where there was a manifest
        if run.train_only is not None:
            tell_step(optimizer)
        with (
            reading_only(run, folder, from_plain_gpt=from_plain_gpt),
            reading_checkpoint(from_plain_gpt=from_plain_gpt, without_adapters=fresh_adapters),
            torch_adam_mended(optimizer, reading=folder is not None),
            groups_of_the_checkpoint({} if from_plain_gpt else common, optimizer, scheduler, run),
            read_where_stored(averages, stored=bool(common) and vars(common["args"]).get("ema_decay") is not None),
        ):
            iteration, flops = call()
            if folder is not None:
                refuse_blind_adapter(unwrap_model(given["ddp_model"]), folder)
            if run.finetune or from_plain_gpt:
                flops = 0  # which Megatron 0.19 takes over, other than iteration and samples
            if getattr(run, DONOR, None) in NO_VALUE_BIAS and run.add_qkv_bias:
                hold_value_biases(given["ddp_model"])
        if plans.growth.at is not None:
            for model in unwrap_model(given["ddp_model"]):
                model.plan = plans.own_plan(iteration)
            if scheduler is not None:
                scheduler.begun = iteration
                scheduler.step(0)
        return iteration, flops
    except (Exception, CheckpointException) as error:
        if folder is None or isinstance(error, UserError):
            raise
        if any(words in str(error) for words in OTHER_DEVICE):
            raise UserError(
                f"The checkpoint {folder} holds the random states of another kind of device, CPU or GPU; add "
                "--no-load-rng to go on with others."
            ) from error
        raise UserError(
            f"The checkpoint {folder} cannot be loaded into this model ({reason_of(error)}); "
            f"check that the architecture flags are those it was trained with and that no file is damaged; "
            f"{advise_other(folder)}."
        ) from error
    finally:
        run.verify_integrity = writes_manifest


def _save(
    record: dict[str, Any], plans: StepPlans, progress: Progress, call: Callable[[], Any], given: dict[str, Any]
) -> Any:
    """A model that has grown is saved as one of its depth: in the arguments, which exports read, and in run.json."""
    run = get_args()
    if run.save is None:  # Megatron saves before it stops for a bad result, asked to or not
        return None
    if is_stream(run):
        share_position(run)
    iteration = given["iteration"]
    if (recursion := plans.growth.config_after(iteration)) is not plans.config:
        vars(run).update(recursion.to_dict())
        plan = plans.own_plan(iteration)
        record = {**record, "recursion": recursion.to_dict(), "plan": json.loads(plan.to_json())}
    root = saving_root(run, passing=given.get("non_persistent_ckpt", False))
    folder = root / f"iter_{iteration:07d}"
    try:
        with progress.saving(iteration, folder, tell=run.rank == 0 and not run.async_save):
            if run.rank == 0:  # a folder that is written again is not complete meanwhile; the manifest names all files
                for name in (COMPLETE, MANIFEST, run_record.FILE):
                    (folder / name).unlink(missing_ok=True)
            if run.train_only is not None:
                tell_step(given["optimizer"])
            result = call()
            if run.rank == 0:
                run_record.write(record, iteration, folder, root)
        return result
    except (OSError, CannotWrite, CheckpointException) as error:
        free = shutil.disk_usage(root).free if root.is_dir() else 0
        code = getattr(cause_of(error), "errno", None)  # which Megatron's writers leave out
        is_full = free < FULL_BYTES if code is None else code in DISK_FULL
        mend = "make room" if is_full else "mend that"
        raise UserError(
            f"The checkpoint of iteration {iteration} cannot be written to {root}, where {free / 1e6:,.1f} MB are "
            f"free ({reason_of(error)}); {mend} and start the same command again, since "
            f"{last_complete(root, Path(run.save))}."
        ) from error


class FilesWithAtomicTracker:
    """Megatron's door to files, but the tracker changes from one iteration to the next in one step."""

    def __init__(self, original: Any) -> None:
        self.__wrapped__ = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "w" and os.path.basename(file) == TRACKER and "://" not in str(file):
            return _replacing(Path(file))
        return self.__wrapped__.open(file, mode, *args, **kwargs)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[str]]:
    partial = target.with_name(f"{target.name}.partial")
    with open(partial, "w") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, target)
