"""The paths of a GPU: ``benchmarks/gpu.sh --device cuda`` on a pretended one (``tests/stand_ins/pretended_cuda``).

It refuses what a GPU refuses: tensors of two devices in one operator, a generator of the other device, CPU tensors in
NCCL. No CUDA kernel runs.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import ON_GPU, REPOSITORY, run_command
from tests.functional_tests.test_gpu_benchmark import rehearse

pytestmark = pytest.mark.heavy
STAND_IN = REPOSITORY / "tests" / "stand_ins" / "pretended_cuda"


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that have the device; its library is compiled here."""
    if ON_GPU or torch.version.cuda is None:
        pytest.skip("a GPU is here" if ON_GPU else "this torch is not built for CUDA: it has no names of its kernels")
    folder, root = tmp_path_factory.mktemp("pretended_cuda"), Path(torch.__file__).parent
    headers = [root / "include", root / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    for needed in (headers[0] / "torch/extension.h", headers[2] / "Python.h"):
        if not needed.exists():
            pytest.skip(f"the header {needed.name} is not there")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    command = [compiler, "-O0", "-std=c++20", "-fPIC", "-shared", "-w", *(f"-I{header}" for header in headers),
               STAND_IN / "pretended_cuda.cpp", "-o", folder / "pretended_cuda_device.so", f"-L{root / 'lib'}",
               "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", f"-Wl,-rpath,{root / 'lib'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return {"MEGATRON_RECURSIVE_PRETEND_CUDA": "1", "MEGATRON_RECURSIVE_PRETEND_CUDA_FOLDER": str(folder),
            "MEGATRON_RECURSIVE_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "0",
            "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(STAND_IN)))}  # fmt: skip


# --- the device itself, in a process that has it ---------------------------------------------------------------------


def refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=words):
        call()


def check_mixes() -> None:
    there, here, index = torch.randn(3, 4, device="cuda"), torch.randn(3, 4), torch.tensor([0])
    assert there.is_cuda and there.device == torch.device("cuda:0")
    mixes: list[Callable[[], Any]] = [
        lambda: there + here, lambda: there @ here.T, lambda: torch.cat([there, here]),
        lambda: torch.stack([there[0], here[0]]), lambda: torch.stack([there[0, 0], here[0, 0]]),
        lambda: torch.where(there > 0, there, here), lambda: there.index_select(0, index),
        lambda: nn.functional.embedding(index, there),
    ]  # fmt: skip
    for mix in mixes:
        refused(mix, "on the same device")
    refused(lambda: here[index.cuda()], "cpu")
    refused(lambda: there.numpy(), "cpu")
    assert there[index].is_cuda and (there + torch.tensor(1.0)).is_cuda  # torch allows both
    assert torch.equal(here.copy_(there), there.cpu())


def check_generators() -> None:
    def draw(device: str, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(9, (8,), device=device, generator=generator)

    refused(lambda: draw("cuda", torch.Generator()), "'cuda' device type for generator")
    refused(lambda: draw("cpu", torch.Generator("cuda")), "'cpu' device type for generator")
    first, again = (draw("cuda", torch.Generator("cuda").manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(1)
    here, state, there = torch.randn(8), torch.cuda.get_rng_state(), torch.randn(8, device="cuda")
    assert not torch.equal(here, there.cpu()) and state.shape == (16,)
    torch.cuda.set_rng_state(state)
    assert torch.equal(there, torch.randn(8, device="cuda"))


def check_memory() -> None:
    flat = torch.zeros(10, device="cuda")
    part = flat[2:5].view(3)
    part.add_(1)
    parameter = nn.Parameter(torch.ones(3, device="cuda"))
    parameter.data = part
    flat.mul_(2)
    assert parameter.tolist() == [2.0, 2.0, 2.0] and float(flat.sum()) == 6.0
    file = io.BytesIO()
    torch.save({"flat": flat}, file)
    file.seek(0)
    assert torch.load(file)["flat"].is_cuda


def check_training() -> None:
    models = [nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    known, given = [*models[0].parameters()], torch.randn(3, 4)
    models[0].cuda()
    refused(lambda: models[0](given), "on the same device")
    for model, values in zip(models, (given.cuda(), given), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(values).square().mean().backward()
            optimizer.step()
    for mine, same, theirs in zip(models[0].parameters(), known, models[1].parameters(), strict=True):
        assert mine is same and mine.grad is not None and mine.grad.is_cuda
        torch.testing.assert_close(mine.cpu(), theirs, atol=1e-6, rtol=1e-5)


def check_nccl() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    values, found = torch.ones(2, device="cuda"), [None]
    dist.all_reduce(values)
    refused(lambda: dist.all_reduce(torch.ones(2)), "cpu")
    dist.all_gather_object(found, {"a": 1})
    assert values.tolist() == [1.0, 1.0] and found == [{"a": 1}]


def check_the_device() -> None:
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    for check in (check_mixes, check_generators, check_memory, check_training, check_nccl):
        check()
    print("all checked")


def test_the_device_refuses_what_a_gpu_refuses(pretended: dict[str, str]) -> None:
    command = [sys.executable, "-c", f"from {__name__} import check_the_device; check_the_device()"]
    done = run_command(command, timeout=200, env=pretended)
    assert done.returncode == 0 and done.stdout.endswith("all checked\n"), done.stderr


def test_processes_that_do_not_ask_have_no_device(pretended: dict[str, str], tmp_path: Path) -> None:
    """And the environment's own sitecustomize is run."""
    (tmp_path / "sitecustomize.py").write_text("print('of the environment')\n")
    paths = os.pathsep.join((pretended["PYTHONPATH"], str(tmp_path)))
    command = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]
    done = run_command(command, timeout=60,
                       env=pretended | {"MEGATRON_RECURSIVE_PRETEND_CUDA": "", "PYTHONPATH": paths})  # fmt: skip
    assert done.stdout == "of the environment\nFalse\n", done.stderr


# --- the package ------------------------------------------------------------------------------------------------------


def test_the_command_rehearses_on_a_pretended_gpu(pretended: dict[str, str], tmp_path: Path) -> None:
    """All parts whose measures mean something here: fp32 against the CPU, bf16 training, text, conversion."""
    names = ("environment", "parity", "training", "control", "profile", "generate", "convert")
    code, record, err = rehearse("--device", "cuda", "--tiny", "--patience", 8, "--out", tmp_path, "--parts", *names,
                                 timeout=590, **pretended)  # fmt: skip
    parts = record["parts"]
    assert code == 0, [part for part in parts.values() if not part["ok"]]
    assert err.count(": ok after") == len(names) and record["device"] == "Pretended GPU"
    assert parts["parity"]["worst_relative_error"] <= 1e-4 and parts["parity"]["tensors"] > 20
    assert parts["control"]["worst_relative_error"] <= 1e-4
    assert parts["training"]["last_loss"] < parts["training"]["first_loss"]
    assert all(parts["generate"][name]["said"]["text"] for name in ("all blocks", "exits"))
