"""Which folder a run reads its checkpoint from, and where it writes them: decided once, and Megatron made to follow.

Beside the checkpoints that it keeps, a run may write passing ones (``--non-persistent-ckpt-type global``) into
``non_persistent`` below --load and --save, or into --non-persistent-global-ckpt-dir. The newer kind is read.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_recursive.errors import UserError
from megatron_recursive.models.checkpoint_integrity import NON_PERSISTENT, TRACKER, complete_iterations

BEST = "best"  # of --keep-best, below --save


def checkpoint_to_read(args: argparse.Namespace) -> tuple[Path | None, bool]:
    """The iteration folder that this run will read (None: none), and whether it holds a plain GPT to start from.

    ``--load`` comes first, so that a run that started with ``--init-from-gpt`` resumes from its own checkpoints.
    """
    if args.load is not None:
        folder = _newest_below(args)
        if folder is not None:
            return folder, False
    if args.init_from_gpt is not None:
        folder = iteration_folder(Path(args.init_from_gpt), "--init-from-gpt")
        if folder is None:
            raise UserError(f"--init-from-gpt {args.init_from_gpt} holds no checkpoint ({TRACKER} is missing).")
        return folder, True
    return None, False


def refuse_missing(args: argparse.Namespace, folder: Path | None) -> None:
    """Refuse to start from random weights where --load names others; a first start may name its own --save."""
    own = args.save is not None and args.load is not None and Path(args.load).resolve() == Path(args.save).resolve()
    if folder is None and args.load is not None and (args.finetune or not own):
        flag = "--finetune" if own else "--load"
        raise UserError(f"--load {args.load} holds no checkpoint ({TRACKER} is missing); name one, or leave {flag} out "
                        "to start from random weights.")  # fmt: skip


def refuse_overwriting(args: argparse.Namespace, folder: Path | None, *, from_plain_gpt: bool) -> None:
    """Refuse to save over a run that this one, which reads ``folder``, does not go on from.

    Going back on purpose, to an earlier iteration of the run's own folder, is allowed.
    """
    if args.save is None or args.skip_train or args.distill_prepare is not None:
        return
    own = Path(args.save).resolve()
    roots = (own, own / BEST, own / NON_PERSISTENT)
    if args.load is not None and not args.finetune and Path(args.load).resolve() in roots:
        return
    start = 0
    if folder is not None and not from_plain_gpt and not args.finetune:
        start = iteration_of(folder) if args.override_ckpt_iteration is None else args.override_ckpt_iteration
    passing = args.non_persistent_ckpt_type == "global" and not args.non_persistent_global_ckpt_dir
    for root in (Path(args.save), *([Path(args.save) / NON_PERSISTENT] if passing else [])):
        if (there := _tracked(root) or 0) > start:
            raise UserError(
                f"{root} holds iteration {there} of an earlier run, which this one would write over, since it starts "
                f"at {start}; give --load {args.save}{' without --finetune' if args.finetune else ''} to go on from "
                "there, or another --save, or remove that folder."
            )


def _newest_below(args: argparse.Namespace) -> Path | None:
    root, passing_root = Path(args.load), non_persistent_root(args, args.load)
    if passing_root is None:
        return iteration_folder(root, "--load", args.ckpt_step)
    if args.ckpt_step is not None:  # a checkpoint that is kept comes before a passing one of that iteration
        name = f"iter_{args.ckpt_step:07d}"
        is_passing = (passing_root / name).is_dir() and not (root / name).is_dir()
        return passing_root / name if is_passing else iteration_folder(root, "--load", args.ckpt_step)
    passing, kept = iteration_folder(passing_root, "--non-persistent-ckpt-type"), iteration_folder(root, "--load")
    if passing is None or kept is None:
        return passing or kept
    return passing if iteration_of(passing) >= iteration_of(kept) else kept


def iteration_folder(root: Path, flag: str, step: int | None = None) -> Path | None:
    """The folder of the latest iteration below a checkpoint root, or of ``step``; None where nothing was saved yet."""
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(errors="replace").strip() if step is None else str(step)
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{flag}: {tracker} must hold an iteration number, but holds {text[:40]!r}; {last_complete(root)}."
        )
    folder = root / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        named = f"{TRACKER} names iteration {text}" if step is None else f"--ckpt-step is {step}"
        raise UserError(f"{flag} {root}: {named}, but {folder} does not exist; {last_complete(root)}.")
    return folder


def iteration_of(folder: Path) -> int:
    return 0 if folder.name == "release" else int(folder.name.removeprefix("iter_"))


def non_persistent_root(args: argparse.Namespace, root: str | None) -> Path | None:
    """The folder of passing checkpoints that goes with --load or --save; None for a run without them."""
    if args.non_persistent_ckpt_type != "global":
        return None
    if args.non_persistent_global_ckpt_dir:
        return Path(args.non_persistent_global_ckpt_dir)
    return Path(root) / NON_PERSISTENT if root is not None else None


def saving_root(args: argparse.Namespace, *, passing: bool) -> Path:
    """Where ``save_checkpoint`` writes."""
    return (non_persistent_root(args, args.save) if passing else None) or Path(args.save)


def _tracked(root: Path) -> int | None:
    """The iteration that the tracker below a root names, whether it is there or not."""
    tracker = root / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    return int(text) if text.isascii() and text.isdigit() else None


def last_iteration(*roots: Path) -> int | None:
    """The newest checkpoint below some roots that can be gone on from: of each the tracker's, or else the largest."""
    found = []
    for root in roots:
        complete, tracked = complete_iterations(root), _tracked(root)
        found += [tracked] if tracked in complete else complete[-1:]
    return max(found, default=None)


def last_complete(*roots: Path) -> str:
    """:func:`last_iteration` in words."""
    last = last_iteration(*roots)
    return "no complete one is there" if last is None else f"the last complete one there is {last}"


@contextlib.contextmanager
def reading_only(args: argparse.Namespace, folder: Path | None, *, from_plain_gpt: bool) -> Iterator[None]:
    """Leave Megatron, which looks for a folder of its own, none but this one (None: none) to find."""
    before = {name: getattr(args, name) for name in
              ("load", "ckpt_step", "non_persistent_ckpt_type", "pretrained_checkpoint")}  # fmt: skip
    args.non_persistent_ckpt_type = args.ckpt_step = None
    if folder is not None:
        args.ckpt_step = iteration_of(folder) or None  # a release is found by its tracker
        if not from_plain_gpt:
            args.load, args.pretrained_checkpoint = str(folder.parent), None
    try:
        yield
    finally:
        vars(args).update(before)
