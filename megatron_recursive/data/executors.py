"""datatrove's executors: processes of this machine, a SLURM cluster, a Ray cluster."""

from __future__ import annotations

import copy
import inspect
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dill
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from megatron_recursive.data.sources import require_packages
from megatron_recursive.errors import UserError


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor on another pool of processes.

    datatrove's own pool waits for ever for a worker that was killed (for want of memory, say), and its workers outlive
    a killed parent. Here a killed worker ends the run, and workers end with their parent. The terminal gets no log.
    """

    def run(self) -> None:
        logger.disable("datatrove")
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                copy.deepcopy(self)._run_for_rank(rank)
        elif ranks:
            self._run_in_processes(ranks)

    def _run_in_processes(self, ranks: Sequence[int]) -> None:
        # forkserver, not fork: the caller may hold threads (torch, Rust), and a forked child can then wait for ever on
        # a lock. Not spawn: what the steps import is imported once, not by each worker.
        context = multiprocessing.get_context("forkserver")
        imported = [(type(step).__module__, *getattr(step, "preload", ())) for step in self.pipeline]
        context.set_forkserver_preload([*dict.fromkeys(itertools.chain(*imported))])
        reader, writer = context.Pipe(duplex=False)
        workers = min(self.workers, len(ranks))
        with ProcessPoolExecutor(workers, context, _start_worker, (dill.dumps(self), reader)) as pool:
            try:
                tasks = [pool.submit(_run_part, rank) for rank in ranks]
                for task in as_completed(tasks):  # not in order: a failure is reported at once
                    task.result()
            except BrokenProcessPool as error:
                raise UserError("a worker was killed, probably for want of memory; give a smaller --workers") from error
            except BaseException:
                writer.close()  # the others need not finish
                raise
            finally:
                pool.shutdown(cancel_futures=True)
                writer.close()
                reader.close()


_executor: bytes = b""


def _start_worker(executor: bytes, parent: Connection) -> None:
    global _executor
    _executor = executor
    logger.disable("datatrove")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: Connection) -> None:
    # Nothing is ever sent: reading ends when the parent closes its end, or dies.
    try:
        parent.recv()
    except (EOFError, OSError):
        os._exit(1)


def _run_part(rank: int) -> None:
    # A fresh copy for each part: the steps count.
    dill.loads(_executor)._run_for_rank(rank, local_rank=rank)


def build_executor(
    kind: str,
    steps: Sequence[PipelineStep],
    tasks: int,
    workers: int,
    logs: Path,
    options: Mapping[str, str],
    depends: PipelineExecutor | None = None,
) -> PipelineExecutor:
    """An executor that runs ``tasks`` tasks of the pipeline, ``workers`` at a time.

    Args:
        kind: ``local``, ``slurm`` or ``ray``.
        logs: where datatrove notes completed tasks; on a cluster, on a file system that all its machines see.
        options: further arguments of datatrove's executor as text, such as ``partition`` for SLURM.
        depends: what must be complete before.

    Raises:
        UserError: an option is unknown, missing or no number, or what the executor needs is not installed.
    """
    shared = {"pipeline": list(steps), "tasks": tasks, "workers": workers, "logging_dir": str(logs)}
    if kind == "local":
        if options:
            raise UserError("--executor-options are for --executor slurm and ray; leave them out")
        return LocalExecutor(**shared)
    chosen: dict[str, Any] = _typed_options(kind, options)
    if kind == "slurm":
        missing = [name for name in ("partition", "time") if name not in options]
        if missing:
            raise UserError(f"--executor slurm needs {missing[0]}; give --executor-options {missing[0]}=...")
        if shutil.which("sbatch") is None:
            raise UserError("--executor slurm needs sbatch, which is not on PATH; start it on a cluster's login node")
        # The job's shell finds datatrove's launcher, this Python, and the module of --pipeline as this process does.
        path = f'export PATH="{Path(sys.executable).parent}:$PATH"'
        chosen.setdefault("env_command", f'{path}\nexport PYTHONPATH="{os.getcwd()}:$PYTHONPATH"')
        chosen.setdefault("job_name", "preprocess_data")
        return SlurmPipelineExecutor(**shared, depends=depends, **chosen)
    require_packages("ray")
    return RayPipelineExecutor(**shared, depends=depends, **chosen)


def _typed_options(kind: str, options: Mapping[str, str]) -> dict[str, Any]:
    """The options as the types of the executor's arguments; only plain numbers and text are taken."""
    executor = SlurmPipelineExecutor if kind == "slurm" else RayPipelineExecutor
    known = inspect.signature(executor.__init__).parameters
    reserved = {"self", "pipeline", "tasks", "workers", "logging_dir", "depends"}
    chosen: dict[str, Any] = {}
    for name, text in options.items():
        if name not in known or name in reserved:
            raise UserError(f"--executor-options {name} is no option of datatrove's {executor.__name__}; leave it out")
        default = known[name].default
        try:
            if isinstance(default, bool):
                chosen[name] = {"true": True, "false": False}[text.lower()]
            elif isinstance(default, (int, float)):
                chosen[name] = float(text) if "." in text else int(text)
            else:
                chosen[name] = int(text) if kind == "ray" and name == "time" else text
        except (ValueError, KeyError) as error:
            raise UserError(f"--executor-options {name}={text} must be a {type(default).__name__}") from error
    return chosen
