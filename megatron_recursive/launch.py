"""Start the ranks of a training run: in this process where there is one, or else with torch's own elastic launch."""

from __future__ import annotations

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
    options = dict(options or {})
    for package in ("torch", "megatron"):
        if importlib.util.find_spec(package) is None:
            raise missing_package(package)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron overlaps communication in this order only
    if options.get("nproc_per_node") == "gpu":
        _require_gpus()
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
    given = [f"--{name}={value}" for name, value in options.items()]
    try:
        torchrun.run(torchrun.parse_args([*given, "-m", PROGRAM, *flags]))
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


def _require_gpus() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("--nproc-per-node gpu needs a CUDA device; give a number of processes.")


def _silence_launcher() -> None:
    """The ranks say what went wrong; torch's handler on "torch.distributed" would add its view of it."""
    for name in ("elastic", "launcher", "run"):
        logger = logging.getLogger(f"torch.distributed.{name}")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
