"""Which device a rank runs on, compared over all ranks before the first process group is made.

A rank without a working GPU runs on the CPU only where that can be meant: no rank of the job has a GPU and no host has
one that does not work, or ``--device cpu`` says so.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_recursive.backends import cpu
from megatron_recursive.errors import UserError

CHOICES = ("auto", "cuda", "cpu")
VARIABLE = "MEGATRON_RECURSIVE_DEVICE"  # what --device is where the command line does not say
PATIENCE = 600.0  # seconds, for ranks that are still importing torch


@dataclass(frozen=True)
class Found:
    """What a rank finds on its host.

    Attributes:
        device: the name of the GPU that it would use; "" for a CPU.
        trouble: why the host's GPU cannot be used, or "".
    """

    rank: int
    host: str
    device: str = ""
    trouble: str = ""


def default() -> str:
    """What ``--device`` is where the command line does not say.

    Raises:
        UserError: :data:`VARIABLE` is no such word.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in CHOICES:
        raise UserError(f"{VARIABLE} is {asked!r}; set it to one of {', '.join(CHOICES)}, or not at all.")
    return asked


def look(asked: str = "auto", machine: Path = Path("/")) -> Found:
    """Try this rank's device. ``machine`` is the root of the file system in which GPUs are looked for."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    found = Found(rank, socket.gethostname())
    if asked == "cpu":
        return found
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            trouble = f"local rank {local_rank} finds only {count} there; start one process a GPU (--nproc-per-node)"
            return Found(rank, found.host, f"CUDA device {local_rank}", trouble)
        try:
            torch.cuda.set_device(local_rank)
            torch.ones(1, device="cuda").add_(1).item()  # a driver lists devices that run nothing
            return Found(rank, found.host, torch.cuda.get_device_name(local_rank))
        except RuntimeError as error:
            return Found(rank, found.host, f"CUDA device {local_rank}", _first_line(error))
    gpu = gpu_of(machine)
    if gpu or asked == "cuda":
        return Found(rank, found.host, gpu or "CUDA device", _why_not())
    return found


def agree(mine: Found, store: Any, world_size: int) -> list[Found]:
    """What every rank found. All wait for the last one."""
    key = f"megatron_recursive/device/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store.set(f"{key}/{mine.rank}", json.dumps(asdict(mine)))
    keys = [f"{key}/{rank}" for rank in range(world_size)]
    store.wait(keys, datetime.timedelta(seconds=PATIENCE))
    return [Found(**json.loads(store.get(each))) for each in keys]


def on_cpu(job: Sequence[Found]) -> bool:
    """Whether this job runs on CPUs.

    Raises:
        UserError: a GPU does not work, or only some ranks have one.
    """
    for found in job:
        if found.trouble:
            raise UserError(
                f"Rank {found.rank} on host {found.host} cannot use its {found.device}: {found.trouble.rstrip('.')}; "
                "mend that, or give --device cpu to run on CPUs."
            )
    with_gpu = next((found for found in job if found.device), None)
    without = next((found for found in job if not found.device), None)
    if with_gpu is not None and without is not None:
        raise UserError(
            f"Rank {without.rank} on host {without.host} has no GPU, but rank {with_gpu.rank} on host {with_gpu.host} "
            f"has an {with_gpu.device}; start the job on hosts that are alike, or give --device cpu to all of them."
        )
    return with_gpu is None


def of_this_process(asked: str | None = None) -> str:
    """``cuda`` or ``cpu``, for a command of one process: as ``--device`` asks, or else :data:`VARIABLE`.

    Raises:
        UserError: the GPU does not work, or there is none where one is asked for.
    """
    if cpu.is_installed():
        return "cpu"
    return "cpu" if on_cpu([look(asked or default())]) else "cuda"


def gpu_of(machine: Path) -> str:
    """A GPU of NVIDIA's that this host has, whether or not a driver or a container lets it through; "" for none."""
    for information in sorted((machine / "proc/driver/nvidia/gpus").glob("*/information")):
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    for node in sorted((machine / "dev").glob("nvidia[0-9]*")):
        return f"GPU /dev/{node.name}"
    for slot in sorted((machine / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = ((slot / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):  # NVIDIA; a display or 3D controller
            return f"NVIDIA GPU (PCI {slot.name})"
    return ""


def _why_not() -> str:
    """Why torch sees no CUDA device here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is '{visible}'"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return "torch finds no device"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()[:200]
