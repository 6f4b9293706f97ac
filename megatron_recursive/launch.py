"""Start the ranks of a training run: in this process where there is one, or else with torch's own elastic launch."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_recursive.command_line import missing_package
from megatron_recursive.errors import UserError

PROGRAM = "megatron_recursive.pretrain"


def launch(flags: Sequence[str], options: Mapping[str, str] | None = None) -> int:
    """Train with these flags.

    Args:
        flags: of the training program.
        options: of torchrun, by name (``nproc_per_node``) and as text; none of them means one process.

    Returns:
        The exit code: that of the rank which failed first, or 128 + the signal that ended it or the launch.
    """
    options = options or {}
    for package in ("torch", "megatron"):
        if importlib.util.find_spec(package) is None:
            raise missing_package(package)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron overlaps communication in this order only
    if set(options) <= {"nproc_per_node"} and options.get("nproc_per_node", "1") == "1":
        return _run_here(flags)
    return _run_ranks(flags, options)


def _run_here(flags: Sequence[str]) -> int:
    from megatron_recursive.training.pretrain import main

    sys.argv = [str(Path(__file__).with_name("pretrain.py")), *flags]  # as a rank of torchrun has it
    main()
    return 0


def _run_ranks(flags: Sequence[str], options: Mapping[str, str]) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if "LOGLEVEL" not in os.environ:
        _silence_launcher()
    args = torchrun.parse_args([*(f"--{name}={value}" for name, value in options.items()), "-m", PROGRAM, *flags])
    _check_options(argparse.Namespace(**vars(args)))
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say so itself
            print(f"error: Rank {rank} was ended by {failure.signal_name()}; if that was for want of memory, take a "
                  "smaller --micro-batch-size, or --recompute-passes.", file=sys.stderr)  # fmt: skip
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    except RendezvousError as error:
        where = options.get("rdzv_endpoint") or options.get("master_addr") or "the local host"
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"The nodes did not meet at {where} ({reason}); check --rdzv-endpoint and --nnodes.") from error
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """What torchrun would find wrong with its options, in a sentence."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    args.master_port = args.master_port or "29500"
    try:
        parse_rendezvous_endpoint(torchrun.config_from_args(args)[0].rdzv_endpoint, default_port=0)
    except (ValueError, AssertionError) as error:
        raise UserError(f"The launcher's options do not fit: {' '.join(str(error).split()).rstrip('.')}.") from error


def _silence_launcher() -> None:
    """The ranks say what went wrong; torch's handler on "torch.distributed" would add its view of it."""
    for name in ("elastic", "launcher", "run"):
        logger = logging.getLogger(f"torch.distributed.{name}")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
