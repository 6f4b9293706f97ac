"""--profile: Megatron's own profiling, with a trace that lands beside the run and is sure to be written.

Megatron's PyTorch profiler writes ``torch_profile/rank-R.json.gz`` beside --tensorboard-dir. Without one the trace goes
to --save. On a machine without CUDA, --profile means the PyTorch profiler, since there is nothing for Nsight Systems.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from megatron_recursive.errors import UserError

FOLDER = "torch_profile"

running: list[Any] = []  # PyTorch profilers whose trace is still to be written


def check(args: argparse.Namespace, *, on_cpu: bool) -> None:
    """Choose the profiler, and refuse what would leave no trace."""
    if not args.profile:
        return
    start, end = args.profile_step_start, args.profile_step_end
    if not 0 <= start < end:
        raise UserError(
            f"--profile-step-start {start} must lie before --profile-step-end {end}; give two iterations in order."
        )
    if args.train_iters is not None and end > args.train_iters:
        raise UserError(
            f"--profile-step-end {end} lies behind the last iteration (--train-iters {args.train_iters}), so that no "
            "trace would be written; give an earlier one."
        )
    strangers = [rank for rank in args.profile_ranks if not 0 <= rank < args.world_size]
    if strangers:
        raise UserError(f"--profile-ranks {strangers[0]} is none of the {args.world_size} ranks of this run.")
    if on_cpu:
        args.use_pytorch_profiler = True
    if args.use_pytorch_profiler and args.tensorboard_dir is None and args.save is None:
        raise UserError("--profile needs --save or --tensorboard-dir, beside which the trace is written.")


def place_trace(args: argparse.Namespace) -> None:
    """Where there is no --tensorboard-dir, send the trace to --save. Call it once Megatron's writers are made.

    Megatron joins ``../torch_profile`` to the name of the tensorboard folder, whether that exists or not.
    """
    if args.profile and args.use_pytorch_profiler and args.tensorboard_dir is None:
        args.tensorboard_dir = os.path.join(args.save, FOLDER)


def stop_all() -> None:
    """Let every running profiler write what it has; in the thread that started it, which alone can."""
    for each in list(running):
        each.stop()
        if each.execution_trace_observer is not None:
            each.execution_trace_observer.unregister_callback()
