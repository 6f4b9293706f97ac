"""The one command for a GPU, benchmarks/gpu.sh, rehearsed on CPUs at tiny sizes; and the wheels that it takes along."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from tests.distributed import REPOSITORY, run_command, run_distributed
from tests.unit_tests.training.runs import in_worker

GPU_SH, FETCH = REPOSITORY / "benchmarks" / "gpu.sh", REPOSITORY / "tools" / "fetch_wheels.sh"
TINY = ["--device", "cpu", "--tiny"]


def rehearse(*arguments: object, timeout: float = 120, **environment: str) -> tuple[int, dict[str, Any], str]:
    done = run_command(["bash", GPU_SH, *map(str, arguments)], timeout=timeout,
                       env={"PYTHON": sys.executable} | environment)  # fmt: skip
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def models_in_worker() -> dict[str, Any]:
    """What the parts with models of their own measure; Megatron is imported already."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    models = importlib.import_module("gpu_parts.models")
    models.prepare()
    found = {name: getattr(models, name)(True) for name in ("speed", "memory")}
    before, arm = held_bytes(), models.Arm(models.TINY["tiny"], {})
    arm.step()
    found["arm"] = held_bytes() - before
    arm.close()
    del arm
    models.free()
    return found | {"left": held_bytes() - before}


def held_bytes() -> int:
    storages = (each.untyped_storage() for each in gc.get_objects() if type(each) in (torch.Tensor, Parameter))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.grid
def test_the_models_of_the_benchmark_run() -> None:
    found = run_distributed(models_in_worker, 1, timeout=120)[0]
    speeds = found["speed"]["models"]
    assert set(speeds) == {"tiny plain", "tiny recursive"}
    assert all(model["tokens_per_second"] > 0 and model["of_matmul"] > 0 for model in speeds.values())
    counted = {name: model["counted_bytes"] for name, model in found["memory"]["models"].items()}
    assert counted["recomputed"] < counted["detached"] < counted["full"]
    assert found["left"] < 0.05 * found["arm"]  # the next model's peak would hold it


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    yield importlib.import_module("gpu")
    sys.modules.pop("gpu", None)


def test_a_part_that_hangs_or_fails_leaves_the_others(driver: Any, tmp_path: Path, capsys: Any) -> None:
    assert driver.run_part("environment", 0.1, TINY)["error"] == "not done after 0 s"
    assert not driver.run_all(["environment", "attention"], ["--device", "none"], tmp_path, 1.0)  # argparse refuses it
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [part["ok"] for part in record["parts"].values()] == [False, False]
    assert "invalid choice: 'none'" in record["parts"]["attention"]["error"]
    assert 500 <= driver.BUDGET <= 540


@pytest.mark.heavy
def test_the_command_rehearses_on_a_cpu(tmp_path: Path) -> None:
    """A part of each kind: by itself, on models of its own, and with a child for each device."""
    code, record, err = rehearse(*TINY, "--patience", 8, "--parts", "environment", "attention", "parity",
                                 "--out", tmp_path, timeout=600)  # fmt: skip
    parts = record["parts"]
    assert code == 0 and "parity: ok" in err, [part for part in parts.values() if not part["ok"]]
    assert json.loads((tmp_path / "cpu.json").read_text()) == record
    assert parts["environment"]["torch"] and record["device"] == "cpu"
    assert set(parts["attention"]["torch_would_take"].values()) == {"FLASH_ATTENTION"}
    assert parts["parity"]["worst_relative_error"] == 0.0 and parts["parity"]["tensors"] > 20


def command_in_worker(words: list[str]) -> str:
    from megatron_recursive.commands import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main(words)
    return said.getvalue()


def run_in_worker(module: str, *words: object) -> str:
    """For ``Context.run``: the same command where Megatron is imported already."""
    argv = [*map(str, words)]
    if module == "megatron_recursive":
        return run_distributed(command_in_worker, 1, argv, timeout=120)[0]
    assert module == "megatron_recursive.pretrain"
    assert run_distributed(in_worker, 1, argv, timeout=120) == [None]
    return ""


@pytest.mark.grid
def test_the_parts_that_are_commands_run(driver: Any, tmp_path: Path) -> None:
    parts = {}
    for part in (driver.training, driver.control, driver.profile, driver.generate, driver.convert, driver.speed_engine):
        context = driver.Context("cpu", True, tmp_path / part.__name__)
        context.run = run_in_worker
        parts[part.__name__] = part(context)
    assert parts["control"]["losses"] == parts["control"]["losses_on_cpu"] and parts["control"]["ok"]
    assert parts["training"]["last_loss"] < parts["training"]["first_loss"]
    assert all(each["said"]["text"] for each in parts["generate"].values())
    assert "config.json" in parts["convert"]["files"] and parts["profile"]["trace_bytes"] > 0
    assert "skipped" in parts["speed_engine"]


# --- wheels ---------------------------------------------------------------------------------------------------------


def fetch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", FETCH, *map(str, arguments)], capture_output=True, text=True, timeout=60,
                          env=os.environ | environment)  # fmt: skip


def test_no_wheel_replaces_torch(tmp_path: Path) -> None:
    names = [line.split("==")[0] for line in fetch("--list").stdout.splitlines()]
    assert {"megatron-core", "numpy", "transformers", "tokenizers", "safetensors"} <= set(names)
    assert not [name for name in names if name.startswith(("torch", "triton", "nvidia", "cuda"))]
    have = tmp_path / "freeze.txt"
    have.write_text("numpy==2.5.0\nhf_xet==1.0\nregex @ file:///somewhere\n")
    left = [line.split("==")[0] for line in fetch("--list", "--have", have).stdout.splitlines()]
    assert set(names) - set(left) == {"numpy", "hf-xet", "regex"}


@pytest.mark.parametrize(("megabytes", "batches"), [((25, 30, 20, 45), [2, 1, 1]), ((10, 61), None)])
def test_a_batch_stays_below_the_limit(tmp_path: Path, megabytes: Any, batches: Any) -> None:
    pip = tmp_path / "python"
    pip.write_text(f"""#!{sys.executable}
import sys
folder = sys.argv[sys.argv.index("--dest") + 1]
for number, size in enumerate({megabytes}):
    open(f"{{folder}}/w{{number}}-1-py3-none-any.whl", "wb").truncate(size * 10**6)
""")
    pip.chmod(0o755)
    done = fetch(tmp_path / "out", PYTHON=str(pip))
    found = sorted((tmp_path / "out").iterdir())
    if batches is None:
        assert done.returncode == 1 and "w1-1-py3-none-any.whl alone has 61000000 bytes" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert [len(list(folder.iterdir())) for folder in found] == batches
    assert all(sum(f.stat().st_size for f in folder.iterdir()) < 60e6 for folder in found)
