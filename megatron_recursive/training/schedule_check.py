"""Schedules of learning rate and weight decay that cannot be, or are not those of the checkpoint, told as flags.

Megatron's ``OptimizerParamScheduler`` asserts on its values when the model is built already, without naming flags. On a
resume it compares nine of them last of all, by their place in the optimizer; here they are compared first. And Megatron
0.19.2 tells the optimizer's parameter groups apart by their learning rates, among others, so that under another --lr it
finds none of them, whatever flag says which rate counts; :func:`groups_of_the_checkpoint` mends that.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of

# A value of the scheduler | Megatron's arguments that it is made of (megatron.training.get_optimizer_param_scheduler).
MADE_OF: dict[str, tuple[str, ...]] = {
    "max_lr": ("lr",),
    "min_lr": ("min_lr",),
    "lr_warmup_steps": ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "global_batch_size"),
    "lr_decay_steps": ("train_iters", "train_samples", "lr_decay_iters", "lr_decay_samples", "global_batch_size"),
    "lr_decay_style": ("lr_decay_style",),
    "start_wd": ("weight_decay", "start_weight_decay"),
    "end_wd": ("weight_decay", "end_weight_decay"),
    "wd_incr_steps": ("train_iters", "train_samples", "global_batch_size"),
    "wd_incr_style": ("weight_decay_incr_style",),
}
# Filled in by Megatron from another argument, unless given.
FOLLOWS = {"lr_decay_iters": "train_iters", "lr_decay_samples": "train_samples",
           "start_weight_decay": "weight_decay", "end_weight_decay": "weight_decay"}  # fmt: skip
DECOUPLED = ("decoupled_lr", "decoupled_min_lr")  # of the embedding and the output layer: no part of the scheduler


def refuse_schedule_values(args: argparse.Namespace) -> None:
    """What ``OptimizerParamScheduler`` asserts of its own values."""
    if args.lr is None:
        raise UserError("--lr is missing; give the learning rate.")
    for flag, value in (("--min-lr", args.min_lr), ("--lr-warmup-init", args.lr_warmup_init)):
        if value > args.lr:
            raise UserError(f"{flag} {value:g} is larger than --lr {args.lr:g}.")
    unit = "iters" if args.train_iters is not None else "samples"
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its last phase.")
    name = f"train_{unit}" if getattr(args, f"lr_decay_{unit}") is None else f"lr_decay_{unit}"
    warmup, decay = getattr(args, f"lr_warmup_{unit}"), getattr(args, name)
    if args.lr_warmup_fraction is None and warmup >= decay:
        raise UserError(f"--lr-warmup-{unit} {warmup} must be smaller than {flag_of(name)} {decay}.")
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise UserError("--override-opt_param-scheduler excludes --use-checkpoint-opt_param-scheduler; give either.")
    start, end = args.start_weight_decay, args.end_weight_decay
    if start is not None and end is not None and start > end:
        raise UserError(f"--start-weight-decay {start:g} is larger than --end-weight-decay {end:g}.")


def check_schedule(folder: Path, common: Mapping[str, Any], scheduler: Any, run: argparse.Namespace) -> None:
    """Refuse to resume with another schedule, unless the flags say which of the two counts.

    ``common`` is the checkpoint's common state, with its arguments and its scheduler; ``scheduler`` is this run's.
    """
    saved = _saved_schedule(common, scheduler, run)
    if not saved or run.override_opt_param_scheduler or run.use_checkpoint_opt_param_scheduler:
        return
    mine = scheduler.state_dict()
    differing = [key for key in MADE_OF if key in saved and saved[key] != mine[key]]
    theirs, flags = vars(common["args"]), dict[str, str]()
    if run.decoupled_lr is not None and theirs.get("decoupled_lr") is not None:  # one without it has another state
        for name in DECOUPLED:
            if theirs.get(name) != getattr(run, name):
                flags[name] = f"{flag_of(name)} {_tell(theirs.get(name))} (this run: {_tell(getattr(run, name))})"
    if not differing and not flags:
        return
    for key in differing:
        for name in MADE_OF[key]:
            old, new = (saved[key], mine[key]) if len(MADE_OF[key]) == 1 else (theirs.get(name), getattr(run, name))
            followed = FOLLOWS.get(name)
            if old != new and not (followed and old == theirs.get(followed) and new == getattr(run, followed)):
                flags[name] = f"{flag_of(name)} {_tell(old)} (this run: {_tell(new)})"
    told = list(flags.values()) or [f"{key} {saved[key]} (this run: {mine[key]})" for key in differing]
    raise UserError(
        f"The checkpoint {folder} was trained on another schedule, with {', '.join(told)}; give its values, or take "
        "this run's with --override-opt_param-scheduler, or the checkpoint's with --use-checkpoint-opt_param-scheduler."
    )


def _saved_schedule(common: Mapping[str, Any], scheduler: Any, run: argparse.Namespace) -> Mapping[str, Any] | None:
    """The state of the scheduler that Megatron will read back; None where it will not."""
    starts_anew = scheduler is None or run.finetune or run.no_load_optim
    return None if starts_anew else common.get("opt_param_scheduler")


@contextlib.contextmanager
def groups_of_the_checkpoint(
    common: Mapping[str, Any], optimizer: Any, scheduler: Any, run: argparse.Namespace
) -> Iterator[None]:
    """While the checkpoint is read, parameter groups go by its rates; afterwards by those that the flags say."""
    saved = _saved_schedule(common, scheduler, run)
    if not saved or not {"max_lr", "min_lr"} <= set(saved):
        yield
        return
    own = [{key: group[key] for key in ("max_lr", "min_lr") if key in group} for group in optimizer.param_groups]
    _exchange(optimizer, _rates(scheduler.max_lr, scheduler.min_lr, vars(run)),
              _rates(saved["max_lr"], saved["min_lr"], vars(common["args"])))  # fmt: skip
    yield
    if run.override_opt_param_scheduler:  # new groups, in the same order
        for group, rates in zip(optimizer.param_groups, own, strict=True):
            group.update(rates)
    scheduler.step(0)  # it sets rates and weight decay, the latter so far from before the load


def _rates(max_lr: float, min_lr: float, args: Mapping[str, Any]) -> list[dict[str, float]]:
    """Those of the model, and behind them those of ``--decoupled-lr``, as parameter groups have them."""
    rates, (largest, smallest) = [{"max_lr": max_lr, "min_lr": min_lr}], (args.get(name) for name in DECOUPLED)
    if largest is not None:
        rates.append({"max_lr": largest, "min_lr": min_lr if smallest is None else smallest})
    return rates


def _exchange(optimizer: Any, old: list[dict[str, float]], new: list[dict[str, float]]) -> None:
    for group in optimizer.param_groups:
        factor = group.get("lr_mult", 1.0)  # of a part of the model (optimizers/parameter_groups.py)
        for before, after in zip(old, new, strict=False):
            if all(group.get(key) == factor * rate for key, rate in before.items()):
                group.update({key: factor * rate for key, rate in after.items()})
                break


def _tell(value: Any) -> str:
    return "not given" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
