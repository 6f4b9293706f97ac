"""A CUDA device that is none, for rehearsals on CPUs: what torch.cuda answers, and what torch decides in Python.

``pretended_cuda.cpp`` makes the tensors; built as pretended_cuda_device.so it is in the folder that
MEGATRON_RECURSIVE_PRETEND_CUDA_FOLDER names. ``install()`` (``sitecustomize.py`` calls it) makes of it one device:
CUDA_VISIBLE_DEVICES="" hides it; nothing is compiled; attention and RMSNorm are made of pieces, each of which looks at
devices and types; "nccl" is torch's fake group, for cuda tensors alone and a world of one.
Why: a CPU alone can so run what the package does on a GPU (``tests/functional_tests/test_pretended_gpu.py``).
Limits: flash, cuDNN's and memory-efficient attention, varlen attention, torch.compile and Triton, streams, figures of
memory, NCCL between ranks, pinned memory, Transformer Engine and several devices are not imitated.
For torch 2.14.1 of requirements/dev.txt; the names replaced are private ones in part.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAME = "pretended_cuda_device"


def load() -> Any:
    """The library, before torch, which makes hooks of its own while it is imported."""
    file = Path(os.environ["MEGATRON_RECURSIVE_PRETEND_CUDA_FOLDER"], f"{NAME}.so")
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.hooks(), "torch had its hooks already"
    return module


os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
library = load()
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

PROPERTIES = SimpleNamespace(name="Pretended GPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132,
                             warp_size=32, max_threads_per_multi_processor=2048, L2_cache_size=1, is_integrated=False,
                             shared_memory_per_block_optin=232448, uuid="0")  # fmt: skip


def visible() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")


def need(*_: Any, **__: Any) -> None:
    if not visible():
        raise RuntimeError("No CUDA GPUs are available")


def always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


# --- torch.cuda -----------------------------------------------------------------------------------------------------


class Nothing:
    """What is entered and left, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.idx = 0  # of torch.cuda.device

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Stream(Nothing):
    cuda_stream = stream_id = device_index = priority = 0
    device_type = 1
    device = torch.device("cuda", 0)

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass


class Event(Stream):
    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = time.perf_counter()

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def wait(self, *_: Any) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


def answer_torch_cuda() -> None:
    generator = library.default_generator()

    def properties(*_: Any, **__: Any) -> SimpleNamespace:
        need()
        return PROPERTIES

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        need()
        return generator.get_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        if state.device.type != "cpu":
            raise TypeError("expected a CPU byte tensor")
        generator.set_state(state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    random = {
        "get_rng_state": get_rng_state, "get_rng_state_all": lambda: [get_rng_state()],
        "set_rng_state": set_rng_state, "set_rng_state_all": lambda states: set_rng_state(states[0]),
        "manual_seed": manual_seed, "manual_seed_all": manual_seed, "initial_seed": generator.initial_seed,
    }  # fmt: skip
    answers = random | {
        "default_generators": (generator,), "init": need, "_lazy_init": need, "_lazy_call": lambda call, **_: call(),
        "is_available": visible, "device_count": lambda: int(visible()), "is_initialized": always(True),
        "_is_compiled": always(True), "current_device": always(0), "get_device_properties": properties,
        "get_device_capability": always((9, 0)), "get_device_name": always(PROPERTIES.name),
        "Stream": Stream, "Event": Event, "current_stream": Stream, "default_stream": Stream, "device": Nothing,
        "stream": always(contextlib.nullcontext()), "is_current_stream_capturing": always(False),
    }  # fmt: skip
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        answers[name] = always(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = always(0)
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name, answer in random.items():
        setattr(torch.cuda.random, name, answer)


# --- what is compiled or has kernels of its own ----------------------------------------------------------------------


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
              dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
              enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError("Expected query, key, and value to have the same dtype, but got "
                           f"{query.dtype} {key.dtype} {value.dtype}")  # fmt: skip
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"Expected attn_mask dtype to be bool or to match query dtype, but got {attn_mask.dtype}")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.float() @ key.float().transpose(-1, -2)) * factor
    if is_causal:
        assert attn_mask is None
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    if attn_mask is not None:  # of a row that sees nothing torch makes zeros
        weights = weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    weights = torch.dropout(weights, dropout_p, dropout_p > 0)
    return (weights @ value.float()).to(query.dtype)


def rms_norm(input: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None,
             eps: float | None = None) -> torch.Tensor:  # fmt: skip
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    wide = input if input.dtype == torch.float64 else input.float()
    normed = wide * torch.rsqrt(wide.square().mean(tuple(range(-len(normalized_shape), 0)), keepdim=True) + eps)
    return (normed if weight is None else normed * weight).to(input.dtype)


def on_the_device(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def call(input: torch.Tensor, *args: Any, **options: Any) -> Any:
        return (ours if input.is_cuda else theirs)(input, *args, **options)

    return call


def replace_kernels() -> None:
    from torch.utils import _triton

    torch.nn.functional.scaled_dot_product_attention = on_the_device(
        torch.nn.functional.scaled_dot_product_attention, attention)  # fmt: skip
    torch.rms_norm = on_the_device(torch.rms_norm, rms_norm)
    torch.backends.cuda.can_use_flash_attention = always(False)
    torch.compile = lambda model=None, **_: model if model is not None else (lambda function: function)
    _triton.has_triton = always(False)


# --- memory and messages ---------------------------------------------------------------------------------------------


def replace_storages() -> None:
    """torch makes storages of a device by its own allocator, not by the registered one."""
    from torch import _utils, storage

    their_to, their_clone, their_resize = _utils._to, torch.UntypedStorage.clone, torch.UntypedStorage.resize_

    def to(self: Any, device: Any, non_blocking: bool = False) -> Any:
        if torch.device(device).type != "cuda" or self.device.type == "cuda":
            return their_to(self, device, non_blocking)
        made = torch.empty(self.nbytes(), dtype=torch.uint8, device="cuda").untyped_storage()
        if self.nbytes():
            made.copy_(self, non_blocking)
        return made

    def clone(self: Any) -> Any:
        return to(self.cpu(), "cuda") if self.device.type == "cuda" else their_clone(self)

    def resize_(self: Any, size: int) -> Any:  # what is given back and taken again keeps its memory
        return self if self.device.type == "cuda" else their_resize(self, size)

    _utils._to = storage._to = to
    torch.UntypedStorage.clone, torch.UntypedStorage.resize_ = clone, resize_


def replace_nccl() -> None:
    """As NCCL, the group takes no CPU tensors."""
    from torch.distributed import distributed_c10d
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the fake group)

    make, begin = distributed_c10d._new_process_group_helper, dist.init_process_group
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_group(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options)
        backend = str(given.arguments["backend"])
        if "nccl" in backend or backend in ("undefined", "None"):
            mixed = "cuda:nccl" in backend
            given.arguments["backend"] = backend.replace("cuda:nccl", "cuda:fake") if mixed else "cuda:fake"
            given.arguments |= dict.fromkeys(given.arguments.keys() & {"backend_options", "device_id"})
        return make(*given.args, **given.kwargs)

    @functools.wraps(begin)
    def init_process_group(*args: Any, **options: Any) -> None:
        options.pop("device_id", None)
        begin(*args, **options)

    distributed_c10d._new_process_group_helper = make_group
    distributed_c10d.init_process_group = dist.init_process_group = init_process_group


def install() -> None:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    library.install([name.removeprefix("aten::") for name in names if name.startswith("aten::")])
    answer_torch_cuda()
    replace_kernels()
    replace_storages()
    replace_nccl()
