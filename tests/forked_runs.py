"""Training commands as children of one process that has Megatron imported: real processes to kill, started in no time.

Importing Megatron costs each process ten seconds. A server imports it once and forks a child for each run; the child
does what ``examples/recursive_gpt/pretrain_recursive_gpt.py`` does, in a process group of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed import REPOSITORY, _worker_environment
from tests.distributed_worker import die_with
from tests.quick_start import ALL, start_quickly

SCRIPT = REPOSITORY / "examples" / "recursive_gpt" / "pretrain_recursive_gpt.py"


@dataclass
class ForkedRun:
    """The ranks of one run. All of them are gone once :meth:`wait` or :meth:`kill` has returned."""

    server: RunServer
    pids: list[int]
    logs: list[Path]

    def wait(self, timeout: float = 120.0) -> list[int]:
        """The exit codes in rank order, negative for a signal."""
        codes = [self.server.ask(wait=pid, timeout=timeout) for pid in self.pids]
        self._end_groups()
        return codes

    def is_running(self) -> bool:
        return all(self.server.ask(poll=pid) is None for pid in self.pids)

    def kill(self, rank: int = 0) -> None:
        """SIGKILL for one rank; those that it leaves behind are then ended as torchrun ends them."""
        os.killpg(self.pids[rank], signal.SIGKILL)
        self.server.ask(wait=self.pids[rank], timeout=30.0)
        self._end_groups()
        for pid in self.pids:
            self.server.ask(wait=pid, timeout=30.0)

    def tail(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in self.logs)

    def _end_groups(self) -> None:
        for pid in self.pids:  # Megatron's checkpointing leaves a manager process in the group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


class RunServer:
    """The parent's side: starts the server with the first run, and ends it with :meth:`close`.

    ``before``: what the server is to execute before it serves.
    """

    def __init__(self, folder: Path, before: str = "") -> None:
        self.folder, self.started = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{before}\nfrom tests.forked_runs import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=_worker_environment(),
            stderr=(folder / "server.log").open("wb"),
        )  # fmt: skip

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "server.log").read_text()[-3000:]
        return json.loads(answer)

    def start(self, argv: Sequence[str], world_size: int = 1) -> ForkedRun:
        self.started += 1
        port, pids, logs = _free_port(), [], []
        for rank in range(world_size):
            logs.append(self.folder / f"run-{self.started}-{rank}.log")
            pids.append(self.ask(argv=list(argv), rank=rank, world_size=world_size, port=port, log=str(logs[-1])))
        return ForkedRun(self, pids, logs)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def _free_port() -> int:
    """A port below those that the kernel hands out: between now and the run's start nobody else is given it."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(happened: Callable[[], bool], run: ForkedRun, timeout: float = 120.0) -> None:
    """Poll often: a save of a tiny model takes a tenth of a second."""
    deadline = time.monotonic() + timeout
    while not happened():
        for _ in range(50):
            time.sleep(0.001)
            if happened():
                return
        assert run.is_running() and time.monotonic() < deadline, run.tail()


# --- The server's side ----------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer a JSON question a line: fork a run, wait for one, or ask whether it is still there."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what the imports print belongs to the log
    _import_all()
    codes: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "argv" in question:
            answer: int | None = _fork(question)
        else:
            pid = question.get("wait") or question["poll"]
            answer = _exit_code(pid, codes, question.get("timeout", 0.0))
            if "wait" in question and answer is None:
                os.killpg(pid, signal.SIGKILL)
                answer = _exit_code(pid, codes, 30.0)
        os.write(answers, (json.dumps(answer) + "\n").encode())
    os._exit(0)


def _exit_code(pid: int, codes: dict[int, int], timeout: float) -> int | None:
    """None while the process is there."""
    deadline = time.monotonic() + timeout
    while pid not in codes:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= deadline:
            return None
        else:
            time.sleep(0.005)
    return codes[pid]


def _import_all() -> None:
    from megatron_recursive.backends import cpu

    cpu.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.training.training  # noqa: F401

        import megatron_recursive.training.forward_step
        import megatron_recursive.training.model_provider
        import megatron_recursive.training.pretrain  # noqa: F401
    start_quickly(ALL)  # as the real commands that some runs are compared with


def _fork(question: dict[str, Any]) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # the child does the same; whoever comes first
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        die_with(server)
        log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        rank, world_size = str(question["rank"]), str(question["world_size"])
        os.environ |= {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(question["port"]),
        }  # fmt: skip
        sys.argv = [str(SCRIPT), *question["argv"]]
        from megatron_recursive.training.pretrain import main

        main()
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as stop:  # --exit-interval
        sys.stdout.flush()
        os._exit(int(stop.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
