"""Patch of megatron-core 0.19: ``load_checkpoint`` refuses a checkpoint of another recursion, in words.

``megatron.training.training`` calls ``load_checkpoint`` as a global of its own; there is no hook. The wrapper compares
the recursion knobs stored in the checkpoint with this run's before any weight is read, tells the model that a
checkpoint is being read (see ``models/checkpoint_keys.py``), and turns what goes wrong into one sentence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException  # NOTE it derives from BaseException

from megatron_recursive.errors import UserError
from megatron_recursive.models.checkpoint_keys import reading_checkpoint
from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.recursion_config import Difference, flag_of

TRACKER = "latest_checkpointed_iteration.txt"


def install(recursion: RecursionConfig) -> None:
    """Wrap the ``load_checkpoint`` that ``pretrain`` calls."""
    from megatron.training import training

    original = training.load_checkpoint
    training.load_checkpoint = _wrap(getattr(original, "__wrapped__", original), recursion)


def _wrap(original: Callable[..., Any], recursion: RecursionConfig) -> Callable[..., Any]:
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, print_rank_0

        run = get_args()
        folder, from_plain_gpt = checkpoint_to_read(run)
        if folder is not None:
            saved = saved_arguments(folder)
            if from_plain_gpt:
                check_is_plain_gpt(folder, saved)
            else:
                for note in check_recursion(folder, saved, recursion, run.override_recursion_depth):
                    print_rank_0(f"> {note}")
        try:
            with reading_checkpoint(from_plain_gpt=from_plain_gpt):
                return original(*args, **kwargs)
        except (Exception, CheckpointException) as error:
            reason = _reason(error)
            if "OptimizerParamScheduler" in reason:
                raise UserError(
                    f"The schedule of this run is not that of the checkpoint {folder} ({reason}); take this run's with "
                    "--override-opt_param-scheduler, or the checkpoint's with --use-checkpoint-opt_param-scheduler."
                ) from error
            raise UserError(
                f"The checkpoint {folder} cannot be loaded into this model ({reason}); "
                f"check that the architecture flags are those it was trained with and that no file is damaged, or "
                f"point {TRACKER} at an earlier iteration."
            ) from error

    load_checkpoint.__wrapped__ = original  # type: ignore[attr-defined]
    return load_checkpoint


def checkpoint_to_read(args: argparse.Namespace) -> tuple[Path | None, bool]:
    """The iteration folder that this run will read (None: none), and whether it holds a plain GPT to start from.

    ``--load`` comes first, so that a run that started with ``--init-from-gpt`` resumes from its own checkpoints.
    """
    if args.load is not None:
        folder = iteration_folder(Path(args.load), "--load", args.ckpt_step)
        if folder is not None:
            return folder, False
    if args.init_from_gpt is not None:
        folder = iteration_folder(Path(args.init_from_gpt), "--init-from-gpt")
        if folder is None:
            raise UserError(f"--init-from-gpt {args.init_from_gpt} holds no checkpoint ({TRACKER} is missing).")
        return folder, True
    return None, False


def iteration_folder(root: Path, flag: str, step: int | None = None) -> Path | None:
    """The folder of the latest iteration below a checkpoint root, or of ``step``; None where nothing was saved yet."""
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(errors="replace").strip() if step is None else str(step)
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{flag}: {tracker} must hold an iteration number, but holds {text[:40]!r}; {_advise_iteration(root)}."
        )
    folder = root / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        named = f"{TRACKER} names iteration {text}" if step is None else f"--ckpt-step is {step}"
        raise UserError(f"{flag} {root}: {named}, but {folder} does not exist; {_advise_iteration(root)}.")
    return folder


def _advise_iteration(root: Path) -> str:
    # Megatron writes metadata.json last, so that a save that was cut short has none.
    complete = sorted(int(file.parent.name.removeprefix("iter_")) for file in root.glob("iter_[0-9]*/metadata.json"))
    return f"the last complete one there is {complete[-1]}" if complete else "no complete one is there"


def saved_arguments(folder: Path) -> dict[str, Any]:
    """The arguments stored in a checkpoint, as a dictionary of primitives (read without unpickling objects)."""
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    try:
        saved = load_common_state_dict(str(folder)).get("args")
    except (Exception, CheckpointException) as error:
        raise UserError(
            f"The checkpoint {folder} cannot be read ({_reason(error)}); "
            f"point {TRACKER} beside it at an earlier iteration."
        ) from error
    if saved is None:
        raise UserError(f"The checkpoint {folder} stores no arguments, so that its recursion is unknown.")
    return dict(vars(saved))


def _reason(error: BaseException) -> str:
    """One line on what went wrong; a CheckpointException's own text is every rank's traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300].rstrip(" :")


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
