"""Runs Megatron-Core 0.19 under gloo on machines without a CUDA device.

Megatron asks torch.cuda for streams, events, random states and memory figures, and writes ``device="cuda"`` into
factory calls. :func:`install` answers those questions for the CPU. Importing this module changes nothing;
:func:`install` does nothing where CUDA exists, unless the CPU is asked for.

What is patched, for the process: functions of ``torch.cuda`` (the table below), ``Tensor.cuda``, ``Module.cuda``,
``Tensor.to``, ``Tensor.type``, the factory functions of torch (their ``device`` only; a global ``TorchFunctionMode``
would tax every operation), ``torch.accelerator.is_available``, ``torch.compile``, which compiles nothing, the
generator of ``torch.utils.data.DataLoader``, and gloo's process groups, which share one device.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device  # not imported by torch itself

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip

_installed = False


def is_installed() -> bool:
    return _installed


def install(*, on_purpose: bool = False) -> bool:
    """Make Megatron run on this CPU. Call it before megatron is imported.

    Args:
        on_purpose: even where a CUDA device exists, which this process then does not see.

    Returns:
        True when the process now runs on the CPU, False where a CUDA device exists and nothing was changed.
    """
    global _installed
    if _installed:
        return True
    if on_purpose:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for package in ("transformer_engine", "apex"):  # Megatron takes their optimizers, which need a GPU, unasked
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    elif torch.cuda.is_available():
        return False
    # Megatron's fusions are decorated with torch.compile, which on the CPU costs seconds and a C++ compiler.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch.compile = _no_compile
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it under tensor parallelism
    _patch_cuda_module()
    _patch_tensor_methods()
    # "with torch.device(...)" knows factories by identity, from a table that is made once: it must hold the originals.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in ("empty", "full", "ones", "tensor", "zeros"):
        method = f"new_{name}"
        setattr(torch.Tensor, method, _on_cpu(getattr(torch.Tensor, method)))
    torch.accelerator.is_available = lambda: False
    _patch_data_loader()
    _patch_gloo_groups()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # Here the "GPU's" random state is the CPU's, so the tracker's warning that both moved is always true.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    _installed = True
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info("%s: Megatron runs on the CPU, under gloo.", "As asked" if on_purpose else "No CUDA device")
    return True


def _patch_data_loader() -> None:
    """A data loader without a generator gets one of its own.

    An iterator draws a seed for its workers from the CPU's random state, which here is also dropout's. A resumed run
    makes its iterators after the checkpoint has restored that state, and would go on with other dropout masks than the
    uninterrupted run.
    """
    import torch.utils.data

    original = torch.utils.data.DataLoader.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator()
        original(self, *args, **kwargs)

    torch.utils.data.DataLoader.__init__ = __init__  # type: ignore[method-assign]


def _patch_gloo_groups() -> None:
    """The gloo groups of a process share one device, which is one thread for all their sockets.

    torch gives each group a device of its own, whose thread wakes a hundred times a second to see whether it may end.
    Megatron makes dozens of groups: on two busy cores their threads made a step over two stages 4% longer.
    """
    from torch.distributed import distributed_c10d

    original: Any = distributed_c10d.ProcessGroupGloo

    class ProcessGroupGloo(original):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any, **more: Any) -> None:
            options = original._Options()
            options._devices, options._threads, options._timeout = [_gloo_device(os.getpid())], 2, timeout
            for name, value in more.items():
                setattr(options, name, value)
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = ProcessGroupGloo  # type: ignore[assignment, misc]


@functools.cache
def _gloo_device(process: int) -> Any:
    """One for each process: a fork has not its parent's threads."""
    return torch.distributed.ProcessGroupGloo.create_default_device()


class _Stream:
    """A stream in which everything has happened already."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass


class _Event(_Stream):
    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _Generators:
    """``torch.cuda.default_generators``: whatever the index, the CPU's."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _no_compile(model: Any = None, **kwargs: Any) -> Any:
    """``torch.compile`` as a call or as a decorator, without compiling."""
    return model if model is not None else (lambda function: function)


def _patch_cuda_module() -> None:
    from torch.utils import _triton

    properties = SimpleNamespace(major=8, minor=0, total_memory=0, multi_processor_count=1, name="cpu")
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: CPU,
        "get_device_properties": lambda *a, **k: properties,
        "get_device_capability": lambda *a, **k: (8, 0),
        "get_device_name": lambda *a, **k: "cpu",
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "manual_seed_all": _answer(None),  # torch.manual_seed calls it after seeding the CPU
        "initial_seed": torch.initial_seed,
        "default_generators": _Generators(),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *a, **k: _Stream(),
        "default_stream": lambda *a, **k: _Stream(),
        "stream": lambda *a, **k: contextlib.nullcontext(),
        "device": lambda *a, **k: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,  # where there is a driver, it fails without a device
        "memory_stats": lambda *a, **k: _NoMemory(),
        "_lazy_call": lambda function, **k: function(),
    }
    # One function object a name: TorchDynamo's tables refuse an object that stands under two names.
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats", "_lazy_init"):
        answers[name] = _answer(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved",
                 "device_memory_used"):  # fmt: skip
        answers[name] = _answer(0)
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _answer(None), _answer(None)
    # transformers imports torchao where it is installed, which asks; the question would look for a CUDA device's index.
    _triton.has_triton = _answer(False)  # type: ignore[assignment]


class _NoMemory(dict):
    """``torch.cuda.memory_stats``: every figure is 0."""

    def __missing__(self, key: str) -> int:
        return 0


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory with a CUDA ``device`` read as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and not isinstance(device, bool) and _is_cuda(device):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def _patch_tensor_methods() -> None:
    tensor_to, tensor_type, module_to = torch.Tensor.to, torch.Tensor.type, torch.nn.Module.to

    def move(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            if args and not isinstance(args[0], bool) and _is_cuda(args[0]):
                args = (CPU, *args[1:])
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return original(self, *args, **kwargs)

        return to

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers compare the name with "torch.cuda.FloatTensor".
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = move(tensor_to)  # type: ignore[method-assign]
    torch.nn.Module.to = move(module_to)  # type: ignore[method-assign]
    torch.Tensor.type = type_  # type: ignore[assignment, method-assign]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
