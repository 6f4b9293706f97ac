"""A rank runs on the CPU only where that is meant: the host's GPUs, the other ranks' and --device are asked first."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from megatron_recursive.backends.device import Found, agree, default, gpu_of, look, on_cpu
from megatron_recursive.errors import UserError
from tests.distributed import REPOSITORY, _free_port


def machine(root: Path, kind: str) -> Path:
    """The files by which a host with a GPU is known, below ``root``."""
    files = {
        "driver": {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H100\nIRQ: 1\n"},
        "nodes": {"dev/nvidia0": "", "dev/nvidiactl": ""},
        "bus": {"sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
                "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n"},
        "laptop": {"sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086\n", "dev/nvidiactl": "",
                   "sys/bus/pci/devices/0000:00:02.0/class": "0x030000\n",
                   "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",  # a sound card
                   "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n"},
    }[kind]  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def a_torch_that_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: torch.zeros(1).view(7))  # a RuntimeError
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


NAMES = {"driver": "NVIDIA H100", "nodes": "GPU /dev/nvidia0", "bus": "NVIDIA GPU (PCI 0000:01:00.0)", "laptop": ""}


@pytest.mark.parametrize(("kind", "name"), NAMES.items())
def test_a_gpu_that_torch_does_not_see_is_found(tmp_path: Path, kind: str, name: str) -> None:
    assert gpu_of(machine(tmp_path, kind)) == name
    found = look("auto", tmp_path)
    assert found.device == name and bool(found.trouble) == bool(name)
    assert look("cpu", tmp_path) == Found(found.rank, found.host)
    assert look("cuda", tmp_path).trouble


def test_a_word_of_the_variable_that_is_none_is_not_taken_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_RECURSIVE_DEVICE", "")
    assert default() == "auto"
    monkeypatch.setenv("MEGATRON_RECURSIVE_DEVICE", "gpu")
    with pytest.raises(UserError, match="MEGATRON_RECURSIVE_DEVICE is 'gpu'; set it to one of auto, cuda, cpu"):
        default()


def test_a_gpu_that_does_not_work_ends_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sentence() -> str:
        with pytest.raises(UserError) as error:
            on_cpu([Found(0, "n1", "NVIDIA H100"), look("auto", machine(tmp_path, "driver"))])
        assert "NVIDIA H100: " in str(error.value) and str(error.value).endswith("; mend that, or give --device cpu "
                                                                                 "to run on CPUs.")  # fmt: skip
        assert f"on host {os.uname().nodename} " in str(error.value)
        return str(error.value)

    assert "invalid for input of size 1" in sentence()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in sentence()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    assert "CUDA_VISIBLE_DEVICES is 'NoDevFiles'" in sentence()


def test_a_listed_device_must_run_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: torch.zeros(1).view(7))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert look().trouble == "shape '[7]' is invalid for input of size 1" and look().device == "CUDA device 1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert "local rank 2 finds only 2 there" in look().trouble


def test_ranks_compare_what_they_found() -> None:
    store, seen = torch.distributed.HashStore(), {}
    job = [Found(0, "n1", "NVIDIA H100"), Found(1, "n1", "NVIDIA H100"), Found(2, "n2")]

    def rank(mine: Found) -> None:
        seen[mine.rank] = agree(mine, store, 3)

    threads = [threading.Thread(target=rank, args=(each,)) for each in job]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == {0: job, 1: job, 2: job}
    with pytest.raises(UserError) as error:
        on_cpu(seen[0])
    assert str(error.value) == (
        "Rank 2 on host n2 has no GPU, but rank 0 on host n1 has an NVIDIA H100; start the job on hosts that are "
        "alike, or give --device cpu to all of them."
    )
    assert on_cpu([Found(0, "n1"), Found(1, "n2")]) and not on_cpu(job[:2])


@pytest.mark.grid
def test_the_ranks_of_a_job_end_together_in_one_sentence() -> None:
    """Rank 1 asks for a GPU where there is none; rank 0, which does not, must not go on without it."""
    port = str(_free_port())
    ranks = []
    for rank, asked in enumerate(("auto", "cuda")):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "7",
        }  # fmt: skip
        command = [sys.executable, "-m", "megatron_recursive.pretrain", "--device", asked]
        ranks.append(subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, cwd=REPOSITORY))
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2]
    (line,) = "".join(said).splitlines()
    assert line.startswith("error: Rank 1 on host ") and "CUDA_VISIBLE_DEVICES is '7'" in line
