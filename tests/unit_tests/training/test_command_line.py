"""The real command: it refuses with exit code 2, one sentence and no traceback. (Killed: test_faults.py.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import run_command
from tests.unit_tests.training.runs import FLAGS, RECURSION, SCRIPT, files_of, save_to, train


def check_refusal(result: subprocess.CompletedProcess[str], expected: str, code: int = 2) -> None:
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == code, result.stderr[-2000:]
    assert len(said) == 1 and expected in said[0] and said[0].endswith("."), result.stderr[-2000:]
    # torchrun's own report follows the sentence of the rank that failed.
    assert "Traceback" not in (result.stderr if code == 2 else result.stderr.split(said[0])[0])
    assert "usage:" not in result.stdout + result.stderr


@pytest.mark.grid
def test_plain_python_refuses_before_anything_is_written(tmp_path: Path) -> None:
    flags = [*FLAGS, *save_to(tmp_path / "run"), "--no-such-flag"]
    check_refusal(run_command([sys.executable, SCRIPT, *flags], timeout=150), "--no-such-flag")
    assert files_of(tmp_path) == {}


@pytest.mark.grid
def test_plain_python_refuses_what_only_shows_while_training_starts(tmp_path: Path) -> None:
    assert train(*save_to(tmp_path), "--train-iters", "3") is None
    (shard,) = (tmp_path / "iter_0000003").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    before = files_of(tmp_path)
    result = run_command([sys.executable, SCRIPT, *FLAGS, *RECURSION, *save_to(tmp_path)], timeout=150)
    check_refusal(result, f"{shard} is damaged or missing (by the SHA-256")
    assert files_of(tmp_path) == before


SENTENCE = "--num-attention-heads 1 is not divisible by --tensor-model-parallel-size 2."


@pytest.mark.grid
def test_torchrun_shows_the_sentence_once() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [*FLAGS, "--num-attention-heads", "1", "--tensor-model-parallel-size", "2"]
    result = run_command([*torchrun, SCRIPT, *flags], timeout=150)
    # torchrun's own exit code is 1; its report follows with a traceback of its own.
    check_refusal(result, SENTENCE, code=1)
    assert "exitcode  : 2" in result.stderr and f"traceback : {SENTENCE}" in result.stderr
