"""Runs the runs: as many processes at a time as there are places for, all ended with this one."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from megatron_recursive.ablation.runs import PlannedRun, Study
from megatron_recursive.errors import UserError

COMMAND = (sys.executable, "-m", "megatron_recursive")
POLL_S, GRACE_S, LINE_S = 0.2, 30.0, 60.0
BAD_LOSS = (16, 17)  # exit codes of Megatron's check of results
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


def places(jobs: int | None) -> list[str]:
    """Where a process can run: the CUDA devices, or where there are none an empty name for each job on the CPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
        visible = ",".join(str(n) for n in range(sum(line.startswith("GPU ") for line in listed)))
    devices = [name for name in (visible or "").split(",") if name not in ("", "-1")]
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    return devices[:jobs] or [""] * (jobs or max(1, len(os.sched_getaffinity(0)) // threads))


tqdm.monitor_interval = 0  # no thread of its own, which a run's start would fork


class Schedule:
    """Trains what is due of a study, with a bar of the FLOPs spent, or lines in a log; ``refresh`` after each run."""

    def __init__(self, study: Study, free: Sequence[str], refresh: Callable[[], object]) -> None:
        self.study, self.free, self.refresh, folder = study, list(free), refresh, study.ablation.output
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(folder / "lock", "w")  # two ablations would train into each other's checkpoints
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is in use by another ablation; wait for it, or give --output.") from error
        self.places, self.running = len(self.free), dict[PlannedRun, tuple[subprocess.Popen[bytes], list[str], int]]()
        self.runs, total = study.size()
        self.is_terminal, self.shown = sys.stderr.isatty(), time.monotonic()
        self.bar = tqdm(total=total, initial=study.spent(), unit="FLOP", unit_scale=True, smoothing=0,
                        file=sys.stderr if self.is_terminal else open(os.devnull, "w"))  # fmt: skip

    def go(self) -> None:
        """Until nothing is due. Ctrl-C stops the runs, each of which keeps its last checkpoint."""
        try:
            while self._fill():
                while not (ended := [run for run, (process, *_) in self.running.items() if process.poll() is not None]):
                    time.sleep(POLL_S)
                    self._show()
                for run in ended:
                    self._show(self._ended(run))
                self.refresh()
        except KeyboardInterrupt:
            tqdm.write(f"stopped: {len(self.study.results)} of {self.runs} runs are done; the same command goes on.")
            raise
        finally:
            self.bar.close()
            for process, *_ in self.running.values():
                _signal(process, signal.SIGINT)
            for process, *_ in self.running.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                _signal(process, signal.SIGKILL)

    def _fill(self) -> bool:
        """Start what fits; whether anything runs. A rate that is chosen only now may have its other seeds done."""
        self.study.read()
        for run in [run for run in self.study.due() if run not in self.running]:
            wanted = min(run.arm.processes, self.places)
            if wanted > len(self.free):
                break
            taken, self.free = self.free[:wanted], self.free[wanted:]
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            if any(taken):
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
            run.folder.mkdir(parents=True, exist_ok=True)
            with open(run.folder / "log.txt", "ab") as log:
                process = subprocess.Popen(
                    [*COMMAND, *run.words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                    start_new_session=True, preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
                )  # fmt: skip
                self.running[run] = process, taken, log.tell()
        return bool(self.running)

    def _ended(self, run: PlannedRun) -> str:
        """Take in how a run ended, and say it."""
        process, taken, start = self.running.pop(run)
        self.free += taken
        _signal(process, signal.SIGKILL)  # saving leaves a helper behind
        code, result, log = process.returncode, run.result(), run.folder / "log.txt"
        if result is not None:
            self.study.results[run] = result
            for old in sorted(run.folder.glob("iter_*"))[:-1]:
                shutil.rmtree(old)
            return f"{run}: held-out loss {result['loss']:.4f}"
        lines = log.read_bytes()[start:].decode(errors="replace").split("\n")
        why = next((line for line in lines[::-1] if line.startswith("error: ")), f"exit code {code}: {lines[-2:-1]}")
        if code == 0:
            why = f"no held-out loss at iteration {run.iterations}; give --eval-iters and held-out data"
        if code < 0 or 128 < code < 160:
            why = f"ended by {signal.Signals(abs(code) % 128).name}; the same command goes on with it"
        if code not in BAD_LOSS:
            self.study.unjudged.add(run)
        self.study.failures[run] = f"{run}: {why.removeprefix('error: ').strip().rstrip('.')} (log: {log})."
        return f"failed: {self.study.failures[run]}"

    def _show(self, said: str = "") -> None:
        if said:
            tqdm.write(said)
        if not said and time.monotonic() - self.shown < (2.0 if self.is_terminal else LINE_S):
            return
        self.shown, self.bar.n = time.monotonic(), self.study.spent()
        ended = len(self.study.results) + len(self.study.failures)
        self.bar.set_postfix_str(f"{ended} of {self.runs} runs, {len(self.running)} running")
        if not self.is_terminal:
            print(str(self.bar).strip(), file=sys.stderr, flush=True)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To a run and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
