"""The harness itself: ranks, failures, hangs, deaths and reuse of workers, and commands with a time limit."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import distributed
from tests.distributed import DistributedFailure, DistributedTimeout, WorkerPool, run_command, run_distributed


@pytest.fixture(scope="module")
def module_pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(imports="torch")
    yield pool
    pool.close()


@pytest.fixture
def expendable_pool(module_pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> WorkerPool:
    """Workers without Megatron, which start faster, for the tests that lose some; other tests keep theirs."""
    monkeypatch.setattr(distributed, "_POOL", module_pool)
    monkeypatch.setattr(distributed, "GRACE", 1.0)
    return module_pool


def sum_of_ranks() -> tuple[float, int, str]:
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return total.item(), dist.get_world_size(), os.environ["RANK"]


def process_id() -> int:
    return os.getpid()


def scaled(weight: torch.Tensor, *, factor: float) -> dict[str, torch.Tensor]:
    return {"scaled": weight * factor * (dist.get_rank() + 1), "half": weight.bfloat16()}


def rank_one_raises() -> None:
    print("a line that rank one printed")
    if dist.get_rank() == 1:
        raise ValueError("the deliberate cause")
    dist.all_reduce(torch.ones(1))


def rank_zero_raises_while_rank_one_sleeps() -> None:
    if dist.get_rank() == 0:
        raise ValueError("the deliberate cause")
    time.sleep(60)


def wait_for_a_message_nobody_sends() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.empty(1), src=1)


def rank_one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.all_reduce(torch.ones(1))


def rank_zero_is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def initialize_megatron_halfway() -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    os.environ["LEFT_BEHIND"] = "1"
    raise ValueError("the deliberate cause")


def megatron_state() -> tuple[bool, bool]:
    from megatron.core import parallel_state

    clean = not parallel_state.model_parallel_is_initialized() and "LEFT_BEHIND" not in os.environ
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    return clean, parallel_state.get_pipeline_model_parallel_world_size() == 2


def running(pid: int) -> bool:
    """Whether a process exists and is not just waiting for its parent to read its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("world_size", [4, 2, 1])
def test_ranks_sum(world_size: int) -> None:
    total = world_size * (world_size + 1) / 2
    assert run_distributed(sum_of_ranks, world_size) == [(total, world_size, str(rank)) for rank in range(world_size)]


def test_workers_are_reused_over_tests_and_world_sizes() -> None:
    pids = run_distributed(process_id, 4)
    assert len({*pids, os.getpid()}) == 5
    assert run_distributed(process_id, 2) == pids[:2]


def test_tensors_travel_by_value() -> None:
    weight = torch.arange(6.0, requires_grad=True).reshape(2, 3)[:, 1:]
    first, second = run_distributed(scaled, 2, weight, factor=0.5)
    assert torch.equal(first["scaled"], weight * 0.5) and torch.equal(second["scaled"], weight)
    assert second["half"].dtype == torch.bfloat16 and not second["half"].requires_grad
    assert second["scaled"].untyped_storage().nbytes() == 4 * 4


def test_a_function_that_workers_cannot_import_is_refused() -> None:
    with pytest.raises(ValueError, match="not a module-level function"):
        run_distributed(lambda: None, 2)


def test_an_exception_shows_its_traceback_and_output_and_spares_the_workers() -> None:
    pids = run_distributed(process_id, 2)
    with pytest.raises(DistributedFailure) as caught:
        run_distributed(rank_one_raises, 2)
    message = str(caught.value)
    assert message.startswith("rank 1 of 2 failed first: ValueError: the deliberate cause")
    assert 'raise ValueError("the deliberate cause")' in message
    assert message.index("rank 1 failed") < message.index("rank 0 failed")
    assert "a line that rank one printed" in message
    assert run_distributed(process_id, 2) == pids


def test_megatron_state_does_not_survive_a_job() -> None:
    with pytest.raises(DistributedFailure, match="the deliberate cause"):
        run_distributed(initialize_megatron_halfway, 2)
    for _ in range(2):
        assert run_distributed(megatron_state, 2) == [(True, True)] * 2


@pytest.mark.grid
def test_a_hang_shows_where_the_rank_stands(expendable_pool: WorkerPool) -> None:
    stuck, spared = run_distributed(process_id, 2)
    began = time.monotonic()
    with pytest.raises(DistributedTimeout) as caught:
        run_distributed(wait_for_a_message_nobody_sends, 2, timeout=2.0)
    message = str(caught.value)
    assert time.monotonic() - began < 15
    assert message.startswith("rank 0 of 2 not done after 2 s")
    assert "in wait_for_a_message_nobody_sends" in message and "in recv" in message
    assert "rank 1 finished" in message
    assert not running(stuck)
    assert run_distributed(process_id, 1) == [spared]


@pytest.mark.grid
def test_a_failure_does_not_wait_for_the_ranks_that_hang(expendable_pool: WorkerPool) -> None:
    run_distributed(process_id, 2)  # pays for the start of a fresh worker
    began = time.monotonic()
    with pytest.raises(DistributedFailure) as caught:
        run_distributed(rank_zero_raises_while_rank_one_sleeps, 2)
    message = str(caught.value)
    assert time.monotonic() - began < 15
    assert message.index("the deliberate cause") < message.index("in rank_zero_raises_while_rank_one_sleeps")


@pytest.mark.grid
def test_a_dying_worker_is_reported_and_replaced(expendable_pool: WorkerPool) -> None:
    with pytest.raises(DistributedFailure, match="rank 1 of 2 failed first: worker process .* died with exit code 3"):
        run_distributed(rank_one_dies, 2)
    assert [total for total, _, _ in run_distributed(sum_of_ranks, 2)] == [3.0, 3.0]


@pytest.mark.grid
def test_a_killed_worker_is_reported(expendable_pool: WorkerPool) -> None:
    with pytest.raises(DistributedFailure, match="died with signal SIGKILL"):
        run_distributed(rank_zero_is_killed, 1)


@pytest.mark.grid
def test_workers_are_started_ahead(expendable_pool: WorkerPool) -> None:
    run_distributed(process_id, 1)
    expendable_pool.prepare(3)
    ahead = [worker.process.pid for worker in (*expendable_pool.workers, *expendable_pool.coming)]
    assert len(ahead) >= 3 and run_distributed(process_id, 3) == ahead[:3]


def test_a_command_returns_its_output_and_exit_code() -> None:
    code = "import os, sys; print(os.environ['FLAVOUR']); sys.exit(5)"
    done = run_command([sys.executable, "-c", code], timeout=30, env={"FLAVOUR": "sour"})
    assert (done.returncode, done.stdout) == (5, "sour\n")


@pytest.mark.grid
def test_a_command_that_hangs_is_killed_with_its_children_and_shows_their_stacks() -> None:
    child = "import os, time\ndef oversleep(): time.sleep(60)\nprint(os.getpid(), flush=True)\noversleep()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    with pytest.raises(DistributedTimeout) as caught:
        run_command([sys.executable, "-c", code], timeout=4.0)
    message = str(caught.value)
    assert "not done after 4 s" in message and "in oversleep" in message
    pid = int(message.split("--- stdout ---\n")[1].split()[0])
    assert not running(pid)
