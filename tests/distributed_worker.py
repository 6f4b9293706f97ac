"""What a worker process of :mod:`tests.distributed` runs: a rank of one job after the other, torch reset between."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import os
import pickle
import queue
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.rendezvous import rendezvous_messages

REPOSITORY = Path(__file__).resolve().parents[1]
ON_GPU = os.environ.get("MEGATRON_RECURSIVE_TEST_GPU") == "1"

# --- What goes over the pipes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One rank's share of a :func:`tests.distributed.run_distributed` call."""

    target: str  # "module:function"
    arguments: bytes  # pickled (args, kwargs)
    rank: int
    world_size: int
    store: str  # path of the FileStore: unlike a TCP port, nobody else can take it in between
    master_port: int  # only for code that reads the environment; the harness does not listen on it
    timeout: float
    rendezvous: float | None = None


@dataclass(frozen=True)
class Reply:
    """A worker's message: it is ready, its job ended, or its state is reset."""

    error: str | None = None  # traceback
    result: bytes = b""
    at: float = 0.0  # time.monotonic(), which all processes of a machine share
    idle: bool = True  # the worker can take the next job


class _ByValuePickler(pickle.Pickler):
    """Pickles tensors as detached CPU copies of exactly their elements.

    NOTE two traps on the usual ways: for Connection.send() torch registers reductions that pass shared memory by file
    descriptor, which leaks; and Megatron replaces the function by which a plain pickle restores a storage, so that the
    parent would import Megatron.
    """

    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(obj, torch.Tensor):
            buffer = io.BytesIO()
            torch.save(obj.detach().cpu().clone(), buffer)
            return _load_tensor, (buffer.getvalue(),)
        return NotImplemented


def _load_tensor(saved: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(saved), weights_only=True)


def dumps(obj: Any) -> bytes:
    buffer = io.BytesIO()
    _ByValuePickler(buffer, pickle.HIGHEST_PROTOCOL).dump(obj)
    return buffer.getvalue()


# --- The worker's side ----------------------------------------------------------------------------------------------


def worker_main() -> None:
    """Serve jobs until the parent closes the pipe. Arguments: pipe, parent's pid, file for stacks, what to import."""
    pipe, parent, stacks, imports = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    os.set_inheritable(pipe, False)
    die_with(parent)
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "ab", buffering=0), all_threads=True, chain=False)
    connection = Connection(pipe)
    if imports == "engine":
        sys.path.insert(0, str(REPOSITORY / "tests" / "stand_ins"))
    connection.send_bytes(dumps(_guarded(_import_torch if imports == "torch" else _import_megatron)))
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            os._exit(0)  # idle and reset: skip the slow interpreter shutdown
        with _process_state_restored():
            reply = _guarded(_run_job, job)
            if reply.error is None:
                connection.send_bytes(dumps(reply))
                connection.recv_bytes()  # "every rank is done"
            reset = _guarded(_reset)
        error = (reply.error or "") + (reset.error or "")
        connection.send_bytes(dumps(Reply(error or None, at=reply.at, idle=reset.error is None)))


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _guarded(step: Callable[..., bytes | None], *args: Any) -> Reply:
    """Run one step; whatever it raises (SystemExit too) becomes a reply with the traceback."""
    try:
        return Reply(result=step(*args) or b"", idle=step is not _run_job)
    except BaseException:
        return Reply(error=traceback.format_exc(), at=time.monotonic(), idle=False)


def _import_torch() -> None:
    import torch

    torch.set_num_threads(1)


def _import_megatron() -> None:
    """Import what every job needs; the CPU backend has to be in place before Megatron-Core is imported."""
    _import_torch()
    if not ON_GPU:
        try:
            backend = importlib.import_module("megatron_recursive.backends.cpu")
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("megatron_recursive"):
                raise
        else:
            backend.install()
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    importlib.import_module("megatron.core.tensor_parallel.random")
    _UNSET.extend(name for name, value in vars(parallel_state).items() if value is None)
    # As training/patches/checkpoints.py has it, for jobs that save by themselves.
    saving: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    saving._results_queue = queue.Queue()
    gc.freeze()  # the modules' objects need no look by the collections after every job


_UNSET: list[str] = []  # globals of parallel_state that are None after its import


def _run_job(job: Job) -> bytes:
    import torch

    os.environ |= {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.rank),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(job.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.master_port),
    }
    sys.argv = ["pytest-worker"]
    _seed_everything()
    backend = "gloo"
    if ON_GPU:
        torch.cuda.set_device(job.rank % torch.cuda.device_count())
        if torch.cuda.device_count() >= job.world_size:
            backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.FileStore(job.store, job.world_size),
        rank=job.rank,
        world_size=job.world_size,
        # The parent's timeout has to come first: it shows where every rank stands.
        timeout=timedelta(seconds=job.timeout + 60),
    )
    module, _, name = job.target.partition(":")
    fn: Any = importlib.import_module(module)
    for attribute in name.split("."):
        fn = getattr(fn, attribute)
    args, kwargs = pickle.loads(job.arguments)
    with contextlib.nullcontext() if job.rendezvous is None else rendezvous_messages(job.rendezvous):
        return dumps(fn(*args, **kwargs))


def _seed_everything() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed would import torch._dynamo, which takes seconds
    if ON_GPU:
        torch.cuda.manual_seed_all(0)


def _reset() -> None:
    """Bring torch and Megatron back to their state after the import."""
    import torch

    if _UNSET:
        reset_megatron()
    gc.collect()  # models in reference cycles hold process groups
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    if torch.are_deterministic_algorithms_enabled():  # setting it imports torch._inductor, which takes seconds
        torch.use_deterministic_algorithms(False)


def reset_megatron() -> None:
    """Undo what a job set in Megatron's module globals, with Megatron's own functions where they exist."""
    parallel_state = sys.modules["megatron.core.parallel_state"]
    # Not only when initialised: a job may have failed halfway through initialize_model_parallel().
    parallel_state.destroy_model_parallel()
    for name in _UNSET:  # it leaves the lists of ranks and the hierarchical groups
        setattr(parallel_state, name, None)
    for name, destroy in (
        ("megatron.core.num_microbatches_calculator", "destroy_num_microbatches_calculator"),
        ("megatron.core.rerun_state_machine", "destroy_rerun_state_machine"),
        ("megatron.training.global_vars", "destroy_global_vars"),
    ):
        if name in sys.modules:
            getattr(sys.modules[name], destroy)()
    rng: Any = sys.modules["megatron.core.tensor_parallel.random"]
    rng._CUDA_RNG_STATE_TRACKER, rng._CUDA_RNG_STATE_TRACKER_INITIALIZED = None, False
    rng._unset_checkpointing()


@contextlib.contextmanager
def _process_state_restored() -> Iterator[None]:
    environment, argv, directory = dict(os.environ), list(sys.argv), os.getcwd()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= environment
        sys.argv = argv
        os.chdir(directory)
