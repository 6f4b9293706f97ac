"""The CPU backend: nothing happens on import, everything on install, and nothing at all where CUDA exists.

Another process is asked, because an installed backend cannot be taken back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

PRELUDE = """
import json, logging, torch
lines = []
class Keep(logging.Handler):
    def emit(self, record): lines.append(record.getMessage())
logging.getLogger("megatron_recursive").addHandler(Keep())
logging.getLogger("megatron_recursive").setLevel(logging.INFO)
NAMES = ["arange", "empty", "full", "ones", "randn", "tensor", "zeros", "compile"]
def surface():
    found = [getattr(torch, name) for name in NAMES]
    found += [torch.Tensor.to, torch.Tensor.type, torch.Tensor.cuda, torch.Tensor.new_empty, torch.nn.Module.to]
    found += [torch.cuda.is_available, torch.cuda.current_device, torch.cuda.Stream, torch.accelerator.is_available]
    return [id(function) for function in found]
"""

INSTALL = """
before = surface()
from megatron_recursive.backends import cpu
result = {"imported": surface() == before, "installed before": cpu.is_installed()}
original, torch.cuda.is_available = torch.cuda.is_available, lambda: True
with_cuda = surface()
result["with CUDA"] = [cpu.install(), surface() == with_cuda, cpu.is_installed(), list(lines)]
torch.cuda.is_available = original
result["first"] = cpu.install()
once = surface()
result["all changed"] = all(a != b for a, b in zip(before, once))
result["second"], result["unchanged"] = cpu.install(), surface() == once
result["installed after"], result["lines"] = cpu.is_installed(), lines
"""

DEVICES = """
like, made = torch.ones(2), {}
for device in ("cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0), "cpu", None, cpu.CPU):
    for tensor in (
        torch.empty(2, device=device), torch.tensor([1.0], device=device), torch.arange(3, device=device),
        torch.zeros_like(like, device=device), torch.full((2,), 1.0, device=device), torch.eye(2, device=device),
        torch.randn(2, device=device), like.new_empty(2, device=device), like.to(device=device),
        torch.randperm(3, device=device), torch.rand(1, device=device),
    ):
        made[str(tensor.device)] = made.get(str(tensor.device), 0) + 1
moved = [like.to("cuda"), like.to("cuda:0", torch.bfloat16), like.cuda(), like.to(torch.device("cuda"))]
module = torch.nn.Linear(1, 1).to("cuda").cuda()
with torch.device("meta"):
    context = str(torch.empty(1).device)
result.update({
    "made": made,
    "moved": sorted({str(tensor.device) for tensor in [*moved, module.weight]}),
    "moved dtype": str(moved[1].dtype),
    "default": str(torch.empty(1).device),
    "meta": str(torch.empty(1, device="meta").device),
    "context": context,
    "type": like.type(),
    "cast": str(like.type(torch.bfloat16).dtype),
    "compiled": [torch.compile(len)([1, 2]), torch.compile(dynamic=True)(len)([1, 2])],
    "triton": __import__("torch.utils._triton").utils._triton.has_triton(),
})
"""

RANDOM = """
torch.manual_seed(5)
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
torch.cuda.manual_seed_all(99)
result["restored"], result["seed"] = torch.equal(first, torch.rand(3)), torch.cuda.initial_seed()
torch.cuda.manual_seed(5)
result["seeded"] = torch.equal(first, torch.rand(3))
"""


GROUPS = """
import os, time
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
groups = [torch.distributed.new_group([0], backend="gloo") for _ in range(3)]
for group in groups:
    torch.distributed.all_reduce(torch.ones(1), group=group)
for _ in range(100):  # a thread names itself once it runs
    time.sleep(0.05)
    tasks = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    if "gloo_tcp_loop" in tasks and tasks.count("pt_gloo_runloop") >= 8:
        break
result["gloo threads"] = {"polling": tasks.count("gloo_tcp_loop"), "working": tasks.count("pt_gloo_runloop")}
"""


@cache
def installed() -> dict[str, Any]:
    """What the code above leaves in ``result``, in a process without any GPU."""
    program = PRELUDE + INSTALL + DEVICES + RANDOM + GROUPS + "\nprint(json.dumps(result))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_import_changes_nothing_and_install_changes_it_once() -> None:
    found = installed()
    assert found["imported"] and not found["installed before"]
    assert found["first"] is True and found["all changed"]
    assert found["second"] is True and found["unchanged"] and found["installed after"]
    assert len(found["lines"]) == 1 and "CPU" in found["lines"][0]


def test_cuda_devices_mean_the_cpu() -> None:
    found = installed()
    assert found["made"] == {"cpu": 8 * 11} and found["moved"] == ["cpu"]
    assert found["default"] == "cpu" and found["meta"] == found["context"] == "meta"
    assert found["moved dtype"] == found["cast"] == "torch.bfloat16" and found["type"] == "torch.cuda.FloatTensor"
    assert found["compiled"] == [2, 2] and found["triton"] is False


def test_the_random_state_is_the_cpus() -> None:
    found = installed()
    assert found["restored"] and found["seeded"] and found["seed"] == 5


def test_with_a_cuda_device_nothing_is_installed() -> None:
    assert installed()["with CUDA"] == [False, True, False, []]


def test_groups_share_the_thread_that_polls_their_sockets() -> None:
    assert installed()["gloo threads"] == {"polling": 1, "working": 8}
