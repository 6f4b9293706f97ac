"""The real command: killed and started again, and refusing with exit code 2, one sentence and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY, run_command
from tests.quick_start import ALL
from tests.unit_tests.training.runs import (
    FLAGS,
    RECURSION,
    SCRIPT,
    files_of,
    metrics_of,
    save_to,
    train,
)

TRACKER = "latest_checkpointed_iteration.txt"


def saved_iterations(folder: Path) -> tuple[int, int]:
    """The iteration that the tracker names and the newest folder's; 0 for none."""
    tracker = folder / TRACKER
    named = int(tracker.read_text() or 0) if tracker.exists() else 0
    return named, max((int(f.name.removeprefix("iter_")) for f in folder.glob("iter_*")), default=0)


def run_and_kill(flags: list[str], log: Path, is_time: Callable[[], bool]) -> None:
    """Start the command in a process group of its own and send SIGKILL when it ``is_time``."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                                "MEGATRON_RECURSIVE_DEVICE": "cpu"}  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *flags], stdout=output, stderr=output, env=environment, process_group=0
        )
        try:
            deadline = time.monotonic() + 150
            while not is_time():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.0005)
            assert process.poll() is None, "the run ended before it was killed"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.mark.grid
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Killed in the middle of a save; the losses equal an undisturbed run's."""
    many = ["--train-iters", "60", "--lr-decay-iters", "60"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(*save_to(whole, every=60), *many, mock_documents=ALL) is None

    def is_saving() -> bool:
        named, newest = saved_iterations(killed)
        return newest > max(named, 7)

    run_and_kill([*FLAGS, *RECURSION, *many, *save_to(killed, every=7)], tmp_path / "log", is_saving)
    named, newest = saved_iterations(killed)
    assert newest > named > 0, "the save was over before the kill"
    assert train(*save_to(killed, every=50), *many, mock_documents=ALL) is None
    assert metrics_of(killed) == metrics_of(whole)


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
