"""run.json beside every checkpoint: what made it.

Plan, knobs, all flags, versions, layout, commit, and one command line that makes it again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.data.files import replacing
from megatron_recursive.training.checkpoint_folders import checkpoint_to_read
from megatron_recursive.training.model_provider import RecursiveGPTModelConfig

FILE = "run.json"
PACKAGES = ("megatron-recursive", "torch", "megatron-core", "transformer-engine", "numpy", "transformers", "tokenizers")
ENVIRONMENT = ("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN",
               "MEGATRON_RECURSIVE_DEVICE")  # fmt: skip
# Where a run reads its start from and writes to; a reproduction has its own.
PLACES = ("--load", "--ckpt-step", "--save", "--metrics-file", "--tensorboard-dir", "--non-persistent-global-ckpt-dir")
REPRODUCED = "reproduced"


def write(record: dict[str, Any], iteration: int, *folders: Path) -> None:
    """Leave run.json in those of the folders that are there."""
    text = json.dumps({**record, "iteration": iteration}, indent=1) + "\n"
    for folder in folders:
        if folder.is_dir():
            with replacing(folder / FILE) as (partial,):
                partial.write_text(text, encoding="utf-8")


def record_of(args: argparse.Namespace, config: RecursiveGPTModelConfig) -> dict[str, Any]:
    """Everything that run.json holds but the iteration. Call it before training: saving changes what --load finds."""
    start, from_plain_gpt = checkpoint_to_read(args)
    return {
        "reproduce": reproduction(args, None if from_plain_gpt else start),
        "command": sys.argv,
        "working directory": os.getcwd(),
        "started from": None if start is None else str(start),
        "commit": commit_of(Path(__file__).parent),
        "versions": versions(),
        "world": {
            "processes": args.world_size,
            "processes a node": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "tensor parallel": args.tensor_model_parallel_size,
            "pipeline parallel": args.pipeline_model_parallel_size,
            "data parallel": args.data_parallel_size,
        },
        "recursion": config.recursion.to_dict(),
        "plan": json.loads(config.plan.to_json()),
        "arguments": {name: primitive(value) for name, value in sorted(vars(args).items())},
    }


def primitive(value: Any) -> Any:
    """A value that JSON can hold: containers element by element, what is no number or text by its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): primitive(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [primitive(each) for each in value]
    return getattr(value, "name", None) or str(value)


def versions() -> dict[str, str]:
    """Python, and those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit_of(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is checked out at, and whether tracked files differ from it; None outside of git."""
    try:
        said = [
            subprocess.run(["git", "-C", str(folder), *what], capture_output=True, text=True, check=True, timeout=20)
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return {"hash": said[0].stdout.strip(), "changed": bool(said[1].stdout.strip())}


def reproduction(args: argparse.Namespace, start: Path | None) -> str:
    """One shell line that runs the same training again from where it began, into the folder ``reproduced`` of --save.

    Over several nodes it is given to each of them, with MASTER_ADDR and MASTER_PORT set alike.
    """
    flags = without_flags(sys.argv[1:], PLACES)
    target = Path(args.save).absolute() / REPRODUCED
    flags += ["--save", str(target)]
    if args.tensorboard_dir is not None:
        flags += ["--tensorboard-dir", str(target / "tensorboard")]
    if start is not None:
        flags += ["--load", str(start.parent.absolute())]
        if start.name != "release":
            flags += ["--ckpt-step", str(int(start.name.removeprefix("iter_")))]
    environment = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    line = [*(["env", *environment] if environment else []), sys.executable]
    program = Path(sys.argv[0]).absolute()
    is_ours = program == Path(__file__).parents[1] / "pretrain.py"  # by path, its folder would hide other modules
    script = [*(["-m", "megatron_recursive.pretrain"] if is_ours else [str(program)]), *flags]
    where = f"cd {shlex.quote(os.getcwd())} && "
    if args.world_size == 1:
        return where + shlex.join([*line, *script])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(args.world_size)))
    torchrun = [*line, "-m", "torch.distributed.run", "--nproc_per_node", str(local)]
    if args.world_size == local:
        return where + shlex.join([*torchrun, "--standalone", *script])
    rendezvous = '--rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT"'
    nodes = ["--nnodes", str(args.world_size // local)]
    return where + f"{shlex.join([*torchrun, *nodes])} {rendezvous} {shlex.join(script)}"


def without_flags(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """A command line without some flags of one value, written ``--flag value`` or ``--flag=value``."""
    kept, skip = [], False
    for word in argv:
        if not skip and word.split("=", 1)[0] not in names:
            kept.append(word)
        skip = not skip and word in names
    return kept
