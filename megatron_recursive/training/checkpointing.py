"""Patch of megatron-core 0.19: checkpoints of another model are refused in words, and faults leave the last good one.

``megatron.training.training`` calls ``load_checkpoint`` and ``save_checkpoint`` as globals of its own, without a hook.
Before any weight is read, the first wrapper checks the files' integrity, compares shape, recursion knobs and schedule
stored in the checkpoint with this run's, and tells the model that a checkpoint is being read (see
``models/checkpoint_keys.py``). Both turn what goes wrong into one sentence that names the last good checkpoint.
Megatron writes its tracker file in place, so that a kill at the wrong moment would leave it empty; here it is written
beside and renamed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.api import CheckpointException  # NOTE it derives from BaseException

from megatron_recursive.accounting import count_parameters
from megatron_recursive.errors import UserError
from megatron_recursive.models.checkpoint_integrity import (
    COMPLETE,
    LIMIT_BYTES,
    MANIFEST,
    TRACKER,
    advise_other,
    check_integrity,
)
from megatron_recursive.models.checkpoint_keys import reading_checkpoint
from megatron_recursive.models.stored_arguments import DONOR, name_as_today
from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.recursion_config import Difference, flag_of
from megatron_recursive.training.architecture import check_architecture
from megatron_recursive.training.checkpoint_folders import checkpoint_to_read, last_complete, reading_only, saving_root
from megatron_recursive.training.model_provider import RecursiveGPTModelConfig, model_shape
from megatron_recursive.training.optimizer_state import check_optimizer, choose_format, torch_adam_mended
from megatron_recursive.training.schedule_check import check_schedule, groups_of_the_checkpoint

STATE_BYTES = 16  # a parameter with its fp32 copy and Adam's moments, at most


def install(args: argparse.Namespace, config: RecursiveGPTModelConfig) -> None:
    """Wrap the ``load_checkpoint`` and ``save_checkpoint`` that ``pretrain`` calls, and the writing of the tracker."""
    from megatron.training import checkpointing, training

    asked, parameters = args.verify_integrity, count_parameters(model_shape(config, args.seq_length), config.plan).held
    choose_format(args, parameters)
    if asked is None:  # the same answer on every rank, before there is a file to measure
        args.verify_integrity = parameters * STATE_BYTES <= LIMIT_BYTES

    training.load_checkpoint = _wrap_load(_unwrapped(training.load_checkpoint), config.recursion, asked)
    training.save_checkpoint = _wrap_save(_unwrapped(training.save_checkpoint))
    checkpointing.maybe_msc = FilesWithAtomicTracker(_unwrapped(checkpointing.maybe_msc))


def _unwrapped(original: Any) -> Any:
    return getattr(original, "__wrapped__", original)


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


def _wrap_save(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        run = get_args()
        root = saving_root(run, passing=kwargs.get("non_persistent_ckpt", False))
        try:
            if run.rank == 0:  # a folder that is written again is not complete meanwhile
                for name in (COMPLETE, MANIFEST):
                    (root / f"iter_{iteration:07d}" / name).unlink(missing_ok=True)
            return original(iteration, *args, **kwargs)
        except (OSError, CheckpointException) as error:
            free = shutil.disk_usage(root).free if root.is_dir() else 0
            last = last_complete(root, Path(run.save))
            raise UserError(
                f"The checkpoint of iteration {iteration} cannot be written to {root}, where {free / 1e6:,.1f} MB are "
                f"free ({_reason(error)}); make room and start the same command again, since {last}."
            ) from error

    save_checkpoint.__wrapped__ = original  # type: ignore[attr-defined]
    return save_checkpoint


def _wrap_load(original: Callable[..., Any], recursion: RecursionConfig, verify: bool | None) -> Callable[..., Any]:
    """``verify`` is what the flags say: True needs a manifest, None checks one that is there, False does not look."""

    def load_checkpoint(ddp_model: Any, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, print_rank_0

        run = get_args()
        writes_manifest = run.verify_integrity
        folder, from_plain_gpt = checkpoint_to_read(run)
        common: dict[str, Any] = {}
        if folder is not None:
            if verify is not False:
                check_integrity(folder, needed=verify is True)
            common = common_state(folder)
            saved = dict(vars(common["args"]))
            if DONOR in saved:
                setattr(run, DONOR, saved[DONOR])
            check_architecture(folder, saved, run)
            if from_plain_gpt:
                check_is_plain_gpt(folder, saved)
            else:
                for note in check_recursion(folder, saved, recursion, run.override_recursion_depth):
                    print_rank_0(f"> {note}")
                check_schedule(folder, common, scheduler, run)
                check_optimizer(folder, common, run)
        try:
            run.verify_integrity = False  # it is done, where there was a manifest
            with (
                reading_only(run, folder, from_plain_gpt=from_plain_gpt),
                reading_checkpoint(from_plain_gpt=from_plain_gpt),
                torch_adam_mended(optimizer, reading=folder is not None),
                groups_of_the_checkpoint({} if from_plain_gpt else common, optimizer, scheduler, run),
            ):
                return original(ddp_model, optimizer, scheduler, *args, **kwargs)
        except (Exception, CheckpointException) as error:
            reason = _reason(error)
            if folder is None:
                raise
            raise UserError(
                f"The checkpoint {folder} cannot be loaded into this model ({reason}); "
                f"check that the architecture flags are those it was trained with and that no file is damaged; "
                f"{advise_other(folder)}."
            ) from error
        finally:
            run.verify_integrity = writes_manifest

    load_checkpoint.__wrapped__ = original  # type: ignore[attr-defined]
    return load_checkpoint


def saved_arguments(folder: Path) -> dict[str, Any]:
    """The arguments stored in a checkpoint, as a dictionary of primitives (read without unpickling objects)."""
    return dict(vars(common_state(folder)["args"]))


def common_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: its arguments, the state of its schedule, counters.

    Raises:
        UserError: it cannot be read, or holds no arguments.
    """
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    try:
        with _without_tracebacks():
            common = load_common_state_dict(str(folder))
    except (Exception, CheckpointException) as error:
        check_integrity(folder)  # names the file, where it can
        why = _reason(error)
        raise UserError(f"The checkpoint {folder} cannot be read ({why}); {advise_other(folder)}.") from error
    if common.get("args") is None:
        raise UserError(f"The checkpoint {folder} stores no arguments, so that its recursion is unknown.")
    name_as_today(common["args"])
    return common


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """torch logs the stack of what it then raises (torch.distributed.checkpoint.state_dict_loader, 2.14)."""
    root = logging.getLogger()

    def has_no_stack(record: logging.LogRecord) -> bool:
        return not (record.module == "state_dict_loader" and record.exc_info)

    root.addFilter(has_no_stack)
    try:
        yield
    finally:
        root.removeFilter(has_no_stack)


def _reason(error: BaseException) -> str:
    """One line on what went wrong; a CheckpointException's own text is every rank's traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300].rstrip(" :")


def check_vocabulary(folder: Path, saved: dict[str, Any], vocab_size: int) -> None:
    """Refuse a checkpoint whose token ids mean something else. ``vocab_size`` is this run's, without padding."""
    known = saved.get("vocab_size")
    if known is not None and known != vocab_size:
        raise UserError(
            f"The checkpoint {folder} was trained with a vocabulary of {known} (this run: {vocab_size}); give its "
            f"tokenizer, or --padded-vocab-size {saved.get('padded_vocab_size')} to keep its rows for another one."
        )


def check_recursion(
    folder: Path, saved: dict[str, Any], recursion: RecursionConfig, override_depth: bool
) -> list[str]:
    """Refuse a checkpoint whose knobs make another function of the weights; say what else has changed.

    Returns:
        Notes on knobs that changed but bind nothing, and on an overridden depth.
    """
    if "enable_recursive_refinement" not in saved:
        if recursion.enable_recursive_refinement:
            raise UserError(
                f"The checkpoint {folder} is of a plain GPT; start from it with --init-from-gpt, or continue it with "
                "--disable-recursive-refinement."
            )
        return []
    changed = RecursionConfig.from_mapping(saved).differences(recursion)
    binding = [d for d in changed if d.binds and not (d.is_depth and override_depth)]
    if binding:
        mend = "give the checkpoint's values"
        if all(d.is_depth for d in binding):
            mend += ", or --override-recursion-depth to change the depth on purpose"
        raise UserError(f"The checkpoint {folder} was trained with {', '.join(map(_tell, binding))}; {mend}.")
    return [f"the checkpoint was trained with {_tell(d)}" for d in changed]


def check_is_plain_gpt(folder: Path, saved: dict[str, Any]) -> None:
    if saved.get("enable_recursive_refinement"):
        raise UserError(f"--init-from-gpt: {folder} is of a recursive model; continue it with --load.")


def _tell(difference: Difference) -> str:
    flag = flag_of(difference.name)
    if isinstance(difference.mine, bool):
        return f"{flag} {'on' if difference.mine else 'off'} (this run: {'on' if difference.theirs else 'off'})"
    return f"{flag} {difference.mine} (this run: {difference.theirs})"
