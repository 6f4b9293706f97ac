"""From the command line to Megatron's own ``pretrain``: read the flags, refuse what cannot work, build, train."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.training import console, ending


def main() -> None:
    """Run a training command. A user's mistake ends in one sentence on stderr and exit code 2."""
    ending.watch_for_interrupts()
    console.install()
    try:
        _run()
    except UserError as error:
        ending.end_with_sentence(error)
    except Exception as error:
        ending.end_with_traceback(error)


def _run() -> None:
    _prepare_environment()
    _choose_device()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Megatron says about optional packages at import
        from megatron.core.enums import ModelType
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.training import pretrain

        from megatron_recursive.pipeline import dispatch
        from megatron_recursive.training.arguments import megatron_speaks_in_sentences, parse_arguments
        from megatron_recursive.training.distillation_files import prepare
        from megatron_recursive.training.forward_step import datasets_provider, forward_step, plan_of_step
        from megatron_recursive.training.metrics_log import MetricsLog
        from megatron_recursive.training.model_provider import model_config_from_args
        from megatron_recursive.training.patches import (
            accounts,
            carried,
            checkpoints,
            loaders,
            observing,
            optimizers,
            profiler,
            wheel,
        )
        from megatron_recursive.training.progress import Progress
        from megatron_recursive.training.report import announce
        from megatron_recursive.training.result_checks import said_in_a_sentence
        from megatron_recursive.training.save_lock import saving_alone
    warnings.filterwarnings("ignore", message=".*is deprecated.*", module="megatron")

    args, recursion = parse_arguments()
    with megatron_speaks_in_sentences(args):
        model_config = model_config_from_args(args, recursion)
        container = pretrain_cfg_container_from_args(args, model_config)
    console.begin(args.log_style, args.save, timers=args.timing_log_level > 0)
    wheel.install()
    if args.distill_prepare is not None and model_config.distillation is not None:
        return prepare(args, model_config.distillation, _in_sentences(datasets_provider))
    with saving_alone(args):
        description = announce(args, model_config)
        progress = Progress()
        plans = model_config.step_plans(args)
        dispatch.install(functools.partial(plan_of_step, plans), recursion.depths_to_evaluate)
        accounts.install(model_config, plans)
        averages = optimizers.install(args, plans.growth)
        carried.install()
        loaders.install()
        checkpoints.install(args, model_config, progress, averages)
        log = MetricsLog(recursion, plans, description, progress)
        observing.install(args, log, averages if args.evaluate_ema else ())
        try:
            with said_in_a_sentence(), profiler.stopped_at_exit(args):
                pretrain(container, _in_sentences(datasets_provider), ModelType.encoder_or_decoder, forward_step)
        except SystemExit as stop:  # --exit-interval and its like
            if not stop.code:
                _close(args, progress)
            raise
        _close(args, progress)


def _choose_device() -> None:
    """Before Megatron is imported: the CPU's surface, where the ranks agree that they run on CPUs."""
    from megatron_recursive.backends import cpu, device

    if cpu.is_installed():
        return
    asked = _device_flag(sys.argv[1:], device.default())
    mine, world_size = device.look(asked), int(os.environ["WORLD_SIZE"])
    job = [mine] if world_size == 1 else device.agree(mine, ending.job_store(device.PATIENCE), world_size)
    if device.on_cpu(job):
        cpu.install(on_purpose=asked == "cpu")


def _device_flag(argv: Sequence[str], default: str) -> str:
    """--device, for which the import of Megatron's parser has to wait; what is wrong with it, that parser will say."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, fromfile_prefix_chars="@")
    peek.add_argument("--device", nargs="?", default=default)
    peek.error = lambda message: None  # type: ignore[method-assign, assignment, return-value]
    return str(peek.parse_known_args(list(argv))[0].device)


def _close(args: Any, progress: Any) -> None:
    import torch

    if args.rank == args.world_size - 1:
        console.say(progress.summary(args))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _in_sentences(datasets_provider: Callable[..., Any]) -> Callable[..., Any]:
    """What Megatron finds wrong only while it builds the datasets (too few documents, say), in one sentence."""

    @functools.wraps(datasets_provider)  # copies is_distributed too
    def provide(*args: Any, **kwargs: Any) -> Any:
        try:
            return datasets_provider(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(str(error).split())[:200] or (frame.line or "").removeprefix("assert ").rstrip(" ,(")
            raise UserError(
                f"The datasets cannot be built ({type(error).__name__}: {reason}); check that --data-path holds enough "
                "documents for every part of --split, and that the --data-cache-path is of this data."
            ) from error

    return provide


def _prepare_environment() -> None:
    """What torchrun would have set, for a run without it: a world of one process."""
    if "RANK" in os.environ:
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")  # the store picks one; another process could take a port chosen here
