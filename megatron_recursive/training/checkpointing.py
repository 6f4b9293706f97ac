"""What is asked of a checkpoint before any weight is read: whole, of the same model, recursion and schedule."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException  # NOTE it derives from BaseException

from megatron_recursive.data.files import CannotWrite
from megatron_recursive.data.splits import MEGATRONS_SPLIT
from megatron_recursive.errors import UserError
from megatron_recursive.models.checkpoint_integrity import advise_other, check_integrity
from megatron_recursive.models.stored_arguments import DONOR, name_as_today
from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.growth import Growth
from megatron_recursive.plan.knobs import flag_of
from megatron_recursive.plan.recursion_config import Difference
from megatron_recursive.training import console
from megatron_recursive.training.architecture import check_architecture
from megatron_recursive.training.lora import check_adapters
from megatron_recursive.training.optimizer_state import check_optimizer, kept_settings
from megatron_recursive.training.progress import tokens_read
from megatron_recursive.training.schedule_check import check_schedule


def check_checkpoint(
    folder: Path, growth: Growth, scheduler: Any, run: argparse.Namespace, *, from_plain_gpt: bool
) -> dict[str, Any]:
    """Refuse a checkpoint that cannot go on in this run; returns its common state (see :func:`common_state`)."""
    common = common_state(folder)
    saved = dict(vars(common["args"]))
    if DONOR in saved:
        setattr(run, DONOR, saved[DONOR])
    run.data_stream_position = saved.get("data_stream_position")
    check_architecture(folder, saved, run)
    check_adapters(folder, saved, run, is_start=from_plain_gpt or run.finetune)
    if from_plain_gpt:
        if saved.get("enable_recursive_refinement"):
            raise UserError(f"--init-from-gpt: {folder} is of a recursive model; continue it with --load.")
        return common
    trained = 0 if run.finetune else common.get("iteration") or 0
    if not run.finetune:  # which Megatron saves with the arguments
        run.samples_before = saved.get("consumed_train_samples") or 0  # an import has none, nor a length
        run.tokens_before = tokens_read(common["args"]) if run.samples_before else 0
    notes = check_recursion(folder, saved, growth.config_after(trained), run.override_recursion_depth)
    if saved.get("ema_decay") is not None and (run.ema_decay is None or run.no_load_optim):
        how = "drops" if run.ema_decay is None else "begins anew, as --no-load-optim asks"
        notes.append(f"the checkpoint averages its weights (--ema-decay {saved['ema_decay']}), which this run {how}")
    notes += kept_settings(common, run) + changed_data(saved, run)
    for note in notes if run.rank == 0 else ():
        console.say(f"> {note}")
    check_schedule(folder, common, scheduler, run)
    check_optimizer(folder, common, run)
    return common


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
        why = reason_of(error)
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


def cause_of(error: BaseException) -> BaseException:
    """What went wrong; a CheckpointException's own text is every rank's traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error.__cause__ if isinstance(error, CannotWrite) and error.__cause__ else error


def reason_of(error: BaseException) -> str:
    """:func:`cause_of` in one line."""
    error = cause_of(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300].rstrip(" :")


def changed_data(saved: dict[str, Any], run: argparse.Namespace) -> list[str]:
    """Notes on flags under which a run does not go on in its data where the checkpoint ended."""
    if run.finetune or not saved.get("consumed_train_samples"):
        return []
    notes = []
    for name, default, makes in (
        ("seed", run.seed, "another order of the data: some are read twice, and evaluations are of others"),
        ("split", MEGATRONS_SPLIT, "other data held out, some of which may have been trained on"),
    ):
        given = (default if each.get(name) is None else each[name] for each in (saved, vars(run)))
        theirs, mine = (str(each).replace(" ", "") for each in given)
        if theirs != mine:
            notes.append(f"the checkpoint was trained with --{name} {theirs} (this run: {mine}), which makes {makes}")
    return notes


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
    changed = RecursionConfig.from_stored(saved).differences(recursion)
    binding = [d for d in changed if d.binds and not (d.is_depth and override_depth)]
    if binding:
        mend = "give the checkpoint's values"
        if all(d.is_depth for d in binding):
            mend += ", or --override-recursion-depth to change the depth on purpose"
        raise UserError(f"The checkpoint {folder} was trained with {', '.join(map(_tell, binding))}; {mend}.")
    return [f"the checkpoint was trained with {_tell(d)}" for d in changed]


def _tell(difference: Difference) -> str:
    flag = flag_of(difference.name)
    if isinstance(difference.mine, bool):
        return f"{flag} {'on' if difference.mine else 'off'} (this run: {'on' if difference.theirs else 'off'})"
    return f"{flag} {difference.mine} (this run: {difference.theirs})"
