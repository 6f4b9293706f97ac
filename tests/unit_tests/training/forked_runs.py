"""Runs of one step, each in a fork of one pool worker, so that what a flag sets in a process ends with it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import tempfile
import time
import traceback
from pathlib import Path

from tests.distributed_worker import die_with
from tests.quick_start import start_quickly
from tests.unit_tests.training.runs import in_worker

AT_ONCE, LIMIT = 2, 60.0  # forks, and the seconds after which one hangs


def endings(commands: list[list[str]]) -> list[str]:
    """How each ended: ``loss X`` of the last step, ``refused: SENTENCE``, or what else it did."""
    import torch
    from megatron.training import training  # noqa: F401  (imported once, before the forks)
    from megatron.training.arguments import add_megatron_arguments

    from megatron_recursive.training import arguments, model_provider, pretrain  # noqa: F401
    from megatron_recursive.training.patches import accounts, checkpoints, observing  # noqa: F401

    torch.distributed.destroy_process_group()  # whose threads a fork would lack
    start_quickly()
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))  # which reads its help once
    waiting, running, said = list(enumerate(commands)), dict[int, tuple[int, float]](), dict[int, str]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                number, argv = waiting.pop(0)
                parent, pid = os.getpid(), os.fork()
                if not pid:
                    _train(argv, Path(folder, str(number)), parent)
                running[pid] = number, time.monotonic()
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                number, _ = running.pop(pid)
                file = Path(folder, str(number), "said")
                said[number] = file.read_text() if file.exists() else f"status {status}, such as of a hang"
            for late in [pid for pid, (_, start) in running.items() if time.monotonic() - start > LIMIT]:
                os.kill(late, signal.SIGKILL)
            time.sleep(0.01)
    return [said[number] for number in range(len(commands))]


def _train(argv: list[str], folder: Path, parent: int) -> None:
    """The fork's part, which does not return."""
    said = "it did not begin"
    with contextlib.suppress(BaseException):
        die_with(parent)
        (folder / "here").mkdir(parents=True)
        os.chdir(folder / "here")  # for what a flag writes to where it is
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
        try:
            sentence = in_worker([*argv, "--metrics-file", str(folder / "metrics.jsonl")])
            said = _loss(folder / "metrics.jsonl") if sentence is None else f"refused: {sentence}"
        except BaseException as error:  # SystemExit too
            said = "".join(traceback.format_exception(error)[-2:])
        (folder / "said").write_text(said)
    os._exit(0)


def _loss(metrics: Path) -> str:
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [record["lm loss"] for record in records if record["kind"] == "train"]
    return f"loss {losses[-1]!r}" if losses else "it ended without a step"
