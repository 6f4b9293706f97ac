"""Run a test function on several torch.distributed ranks, or a command in a process group of its own.

:func:`run_distributed` keeps a pool of worker processes for the whole pytest session, because importing torch and
Megatron-Core costs each process about ten seconds. This module itself imports neither: pytest's process stays clean.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

from tests.distributed_worker import ON_GPU as ON_GPU
from tests.distributed_worker import REPOSITORY as REPOSITORY
from tests.distributed_worker import Job, Reply, dumps

MAX_WORKERS = 4
START_TIMEOUT = 300.0  # seconds for the imports of all new workers, on a busy machine
RESET_TIMEOUT = 30.0  # seconds for closing the process groups after a job
GRACE = 5.0  # seconds that the other ranks get once one rank has failed
LOG_LINES = 60

# What gloo says on a rank whose peer went away: a consequence of another rank's failure, not the cause.
_PEER_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed")


class DistributedFailure(AssertionError):
    """A rank raised an exception or died; the message holds every failing rank's traceback, the cause first."""


class DistributedTimeout(DistributedFailure):
    """Ranks (or a command) did not end in time; the message says where they stand."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    pool: WorkerPool | None = None,
    rendezvous: float | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` on ``world_size`` gloo ranks and return the results in rank order.

    ``fn`` is a module-level function; workers import it by name. Arguments and results are pickled by value, tensors
    as detached CPU copies. Every call starts with seed 0 and without any Megatron state. Pytest does not rewrite
    ``assert`` in the workers: prefer ``torch.testing.assert_close``, which shows the values.
    ``pool``: other workers than usual.

    ``rendezvous``: messages between two ranks wait as NCCL's may (``tests/rendezvous.py``), each for so many seconds.

    Raises:
        DistributedFailure: a rank raised an exception or died.
        DistributedTimeout: some rank was not done after ``timeout`` seconds and none failed.
    """
    if not 1 <= world_size <= MAX_WORKERS:
        raise ValueError(f"world_size is {world_size}, but the pool has 1 to {MAX_WORKERS} ranks")
    if "<" in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} is not a module-level function, so workers cannot import it")
    target = f"{fn.__module__}:{fn.__qualname__}"
    return (pool or _the_pool()).run(target, world_size, dumps((args, kwargs)), timeout, rendezvous)


def start_ahead() -> None:
    """For a session that will need all workers: they import while tests are collected and the first ones run."""
    pool = _the_pool()
    pool.ahead = True
    pool.prepare(1)


def shutdown_pool() -> None:
    """Stop the workers, if any were started; a later :func:`run_distributed` starts new ones."""
    global _POOL
    if _POOL is not None:
        pool, _POOL = _POOL, None
        pool.close()


def processes_with(variable: str) -> list[int]:
    """The processes that have ``NAME=VALUE`` in their environment: those of a command that was given it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def run_command(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command (from the repository root by default) with captured output; the caller judges its exit code.

    ``env`` is added to the workers' environment. After ``timeout`` seconds the command and all its descendants are
    asked for their Python stacks and killed, and :class:`DistributedTimeout` shows the end of the output.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd or REPOSITORY,
            env=_worker_environment() | {"PYTHONFAULTHANDLER": "1"} | dict(env or {}),
            process_group=0,
        )
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.returncode is None:
                _abort_tree(process)
        out, err = (_read_from(stream) for stream in (stdout, stderr))
    if timed_out:
        command = " ".join(map(str, argv))
        raise DistributedTimeout(
            f"not done after {timeout:g} s: {command}\n--- stdout ---\n{_tail(out)}--- stderr ---\n{_tail(err, 200)}"
        )
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


class _Worker:
    """One worker process as its parent sees it."""

    def __init__(self, directory: Path, serial: int, imports: str) -> None:
        self.log = directory / f"worker-{serial}.log"
        self.stacks = directory / f"worker-{serial}.stacks"
        self.log_start = self.stacks_start = 0  # where the present job's part begins
        self.idle = False
        self.connection, remote = Pipe()
        with remote, self.log.open("ab") as log:
            arguments = [str(remote.fileno()), str(os.getpid()), str(self.stacks), imports]
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from tests.distributed_worker import worker_main; worker_main()", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=_worker_environment(),
                pass_fds=[remote.fileno()],
                process_group=0,  # Ctrl-C is the parent's affair
            )

    def send(self, message: Any) -> None:
        """Send a message; if the worker is dead, :meth:`receive` will say so."""
        self.idle = False
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(dumps(message))

    def start_job(self, job: Job) -> None:
        self.log_start = self.log.stat().st_size
        self.send(job)

    def receive(self) -> Reply | None:
        """The worker's next reply, its death as a reply, or None when it is still at work."""
        try:
            if self.connection.poll():
                reply: Reply = pickle.loads(self.connection.recv_bytes())
                self.idle = reply.idle
                return reply
            if self.process.poll() is None:
                return None
        except (EOFError, ConnectionResetError):
            pass
        return Reply(error=f"{self._obituary()}\n", at=time.monotonic(), idle=False)

    def _obituary(self) -> str:
        code = self.process.wait(RESET_TIMEOUT)
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"worker process {self.process.pid} died with {how}"

    def ask_for_stacks(self) -> None:
        self.stacks_start = self.stacks.stat().st_size if self.stacks.exists() else 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)

    def read_stacks(self) -> str:
        if not self.stacks.exists():
            return "no stacks: the worker has not even begun its imports\n"
        with self.stacks.open("rb") as file:
            return _read_from(file, self.stacks_start)

    def read_log(self) -> str:
        with self.log.open("rb") as file:
            return _tail(_read_from(file, self.log_start))

    def stop(self) -> None:
        """Let an idle worker leave; kill it if it is at work."""
        self.connection.close()
        if not self.idle:
            self.process.kill()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # Megatron's checkpointing leaves a manager process behind


class WorkerPool:
    """Up to :data:`MAX_WORKERS` idle workers; a job of n ranks takes the first n.

    ``imports`` is "megatron"; "torch" for workers that start faster but cannot clean up after Megatron; or "engine" for
    Megatron on the stand-ins of Transformer Engine.
    """

    def __init__(self, imports: str = "megatron") -> None:
        self.imports = imports
        self.workers: list[_Worker] = []
        self.coming: list[_Worker] = []  # they are still importing
        self.ahead = False  # have all workers ready once the first job is under way
        self.started = 0
        self.jobs = 0
        self.scratch = tempfile.TemporaryDirectory(prefix="run_distributed_")

    def run(
        self, target: str, world_size: int, arguments: bytes, timeout: float, rendezvous: float | None = None
    ) -> list[Any]:
        team = self._team(world_size)
        self.jobs += 1
        store, port = str(Path(self.scratch.name) / f"store-{self.jobs}"), _free_port()
        try:
            for rank, worker in enumerate(team):
                worker.start_job(Job(target, arguments, rank, world_size, store, port, timeout, rendezvous))
            if self.ahead:
                self.prepare(MAX_WORKERS)
            replies = _collect(team, timeout)
            failure = _failure(team, replies, timeout)
            # A rank keeps its sockets until all have their results: closing them early could cut off a slower peer.
            finished = [worker for worker, reply in zip(team, replies, strict=True) if reply and reply.error is None]
            for worker in finished:
                worker.send("every rank is done")
            resets = _collect(finished, RESET_TIMEOUT)
            failure = failure or _failure(finished, resets, RESET_TIMEOUT)
        finally:
            self._drop_busy()
        if failure is not None:
            raise failure
        return [pickle.loads(reply.result) for reply in replies if reply is not None]

    def prepare(self, size: int) -> None:
        """Start the workers that a job of ``size`` ranks lacks, without waiting for their imports."""
        while len(self.workers) + len(self.coming) < size:
            self.coming.append(_Worker(Path(self.scratch.name), self.started, self.imports))
            self.started += 1

    def _team(self, size: int) -> list[_Worker]:
        """The first ``size`` workers, after starting those that are missing, all at the same time."""
        self.prepare(size)
        new = [self.coming.pop(0) for _ in range(size - len(self.workers))]
        self.workers += new
        try:
            failure = _failure(new, _collect(new, START_TIMEOUT), START_TIMEOUT)
        finally:
            self._drop_busy()
        if failure is not None:
            raise failure
        return self.workers[:size]

    def _drop_busy(self) -> None:
        """Kill the workers whose state is unknown: stuck, dead, or interrupted together with the parent."""
        for worker in [worker for worker in self.workers if not worker.idle]:
            self.workers.remove(worker)
            worker.stop()

    def close(self) -> None:
        for worker in [*self.workers, *self.coming]:
            worker.stop()
        self.scratch.cleanup()


_POOL: WorkerPool | None = None


def _the_pool() -> WorkerPool:
    global _POOL
    if _POOL is None:
        _POOL = WorkerPool()
        atexit.register(shutdown_pool)
    return _POOL


def _collect(team: Sequence[_Worker], timeout: float) -> list[Reply | None]:
    """One reply of every worker, or None for those that are stuck when the time is over."""
    replies: list[Reply | None] = [None] * len(team)
    deadline = time.monotonic() + timeout
    while waiting := [rank for rank, reply in enumerate(replies) if reply is None]:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            break
        # A child that a worker forked can hold the pipe open after the worker's death, hence the short period.
        wait([team[rank].connection for rank in waiting], min(remaining, 0.2))
        for rank in waiting:
            reply = replies[rank] = team[rank].receive()
            if reply is not None and reply.error is not None:
                deadline = min(deadline, time.monotonic() + GRACE)
    return replies


def _failure(team: Sequence[_Worker], replies: Sequence[Reply | None], timeout: float) -> DistributedFailure | None:
    """The exception that tells how the ranks ended, or None when all is well."""
    stuck = [rank for rank, reply in enumerate(replies) if reply is None]
    errors = {rank: reply for rank, reply in enumerate(replies) if reply is not None and reply.error is not None}
    if not stuck and not errors:
        return None

    def lateness(rank: int) -> tuple[bool, float]:
        return any(phrase in str(errors[rank].error) for phrase in _PEER_LOST), errors[rank].at

    failed = sorted(errors, key=lateness)
    text = {rank: _abridged(str(errors[rank].error)) for rank in failed} | _stacks({rank: team[rank] for rank in stuck})
    if failed:
        headline = f"rank {failed[0]} of {len(team)} failed first: {text[failed[0]].rstrip().splitlines()[-1]}"
    else:
        headline = f"rank {', '.join(map(str, stuck))} of {len(team)} not done after {timeout:g} s"
    lines = [headline]
    lines += [f"--- rank {rank} failed ---\n{text[rank]}" for rank in failed]
    lines += [f"--- rank {rank} is stuck, its threads ---\n{text[rank]}" for rank in stuck]
    lines += [f"--- rank {rank} finished ---" for rank in range(len(team)) if rank not in text]
    logs = {rank: team[rank].read_log() for rank in [*failed, *stuck]}
    lines += [f"--- output of rank {rank} ---\n{log}" for rank, log in logs.items() if log.strip()]
    return (DistributedFailure if failed else DistributedTimeout)("\n".join(lines))


def _stacks(workers: Mapping[int, _Worker]) -> dict[int, str]:
    """The Python stacks of all threads of some workers, which may be stuck in C code."""
    for worker in workers.values():
        worker.ask_for_stacks()
    if workers:
        time.sleep(1.0)
    return {rank: worker.read_stacks() for rank, worker in workers.items()}


def _worker_environment() -> dict[str, str]:
    """The parent's environment with one thread per rank, gloo on the loopback interface and no GPU."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",
    }
    return environment if ON_GPU else environment | {"CUDA_VISIBLE_DEVICES": "", "MEGATRON_RECURSIVE_DEVICE": "cpu"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _abort_tree(process: subprocess.Popen[bytes]) -> None:
    """Make a command and its descendants print their Python stacks (PYTHONFAULTHANDLER), then kill them.

    The process group alone would miss torchrun's ranks, which may live in sessions of their own.
    """
    # Parents first, since one whose child has ended would go on; one by one, or their stacks would mix.
    tree = [process.pid, *_descendants(process.pid)]
    for deadly, patience in ((signal.SIGABRT, 2.0), (signal.SIGKILL, 0.0)):
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
                os.kill(pid, deadly)
            deadline = time.monotonic() + patience
            while _is_running(pid) and time.monotonic() < deadline:
                time.sleep(0.01)
    process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _descendants(pid: int) -> list[int]:
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]  # "pid (name) state parent ..."
            children[int(parent)].append(int(stat.parent.name))
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for parent in frontier for child in children[parent]]
        found += frontier
    return found


def _read_from(file: Any, start: int = 0) -> str:
    file.seek(start)
    return file.read().decode(errors="replace")


def _abridged(text: str, edge: int = 60) -> str:
    """A traceback without its middle: an endless recursion has thousands of lines."""
    lines = text.splitlines(keepends=True)
    if len(lines) <= 2 * edge:
        return text
    return "".join([*lines[:edge], f"... {len(lines) - 2 * edge} lines left out ...\n", *lines[-edge:]])


def _tail(text: str, lines: int = LOG_LINES) -> str:
    return "".join(line + "\n" for line in text.splitlines()[-lines:])
