"""What a run shows and where the rest goes; how it says that it ended."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import json
import os
import re
import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.figures import blocks_of, duration
from megatron_recursive.training import console, ending, progress_lines
from tests.distributed import run_command, run_distributed
from tests.forked_runs import RunServer, wait_until
from tests.unit_tests.training.runs import FLAGS, RECURSION, in_worker, save_to, train

WIDTH = 120  # columns


# --- lines ----------------------------------------------------------------------------------------------------------


def metrics_of_blocks(blocks: int) -> dict[str, float]:
    metrics = {"lm loss": 11.123456, "halt loss": 12.3456, "total loss": 23.4, "expected refinement steps": 11.97}
    for block in range(1, blocks + 1):
        metrics |= {f"lm loss block {block}": 10 + 1 / block, f"output change block {block}": 1 / block}
    return metrics


@pytest.mark.parametrize("blocks", [0, 1, 3, 12])
@pytest.mark.parametrize("iterations", [10, 1_000_000])
def test_a_row_fits_and_stands_under_its_header(blocks: int, iterations: int) -> None:
    metrics = metrics_of_blocks(blocks)
    head = progress_lines.header(metrics, iterations)
    row = progress_lines.row(
        iterations, iterations, 1.23e15, metrics, grad_norm=1.23e-5, learning_rate=1.5e-4, tokens_per_second=9.87e6,
        left=3.2e7,
    )  # fmt: skip
    assert len(row) == len(head) <= WIDTH
    ends = [found.end() for found in re.finditer(r"\S+(?: \S+)*", head)]
    assert all(row[end - 1] != " " and row[end : end + 1] in (" ", "") for end in ends), f"\n{head}\n{row}"
    table = progress_lines.evaluation("held out at iteration 7", metrics).splitlines()
    assert max(map(len, table)) <= WIDTH


def test_of_many_blocks_the_first_and_the_last_are_shown() -> None:
    assert progress_lines.shown_blocks(range(1, 14)) == [1, 7, 13]
    assert progress_lines.shown_blocks([1, 2, 3]) == [1, 2, 3]
    counts = [950, 1200, 99_960, 307_200, 999_600, 6.5e6, 1.3e9, 2e12]
    assert [progress_lines.count(n) for n in counts] == ["950", "1.2k", "100k", "307k", "1.0M", "6.5M", "1.3B", "2.0T"]
    assert [duration(s) for s in (43, 125, 11_400, 1_051_200)] == ["43s", "2m05s", "3h10m", "12d04h"]


def rows_of_drawn_depths(file: str, distribution: str) -> tuple[list[str], list[int]]:
    """What the compact style shows of nine iterations, and how many blocks each of them had."""
    from megatron_recursive.plan import RecursionConfig, StepPlans, build_plan
    from megatron_recursive.training import metrics_log
    from megatron_recursive.training.progress import Progress

    knobs = RecursionConfig(recursion_family="looped", num_refinement_blocks=4, recurrence_distribution=distribution)
    config = knobs.resolved(embedding_init_std=0.02)
    plans, said = StepPlans(config, build_plan(config), iterations=9), list[str]()
    run = Namespace(rank=0, world_size=1, log_interval=1, train_iters=9, consumed_train_samples=4, seq_length=16,
                    metrics_file=file, flops_spent=1.0)  # fmt: skip
    depths = [plans.plan_at(step).depth for step in range(9)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "style", lambda: "compact")
        patch.setattr(console, "say", said.append)
        log = metrics_log.MetricsLog(config, plans, {}, Progress())
        for iteration, depth in enumerate(depths, start=1):
            log.trained(run, {"iteration": iteration, "loss_dict": metrics_of_blocks(depth)})
    return said, depths


def test_no_loss_stands_under_another_blocks_name(tmp_path: Path) -> None:
    """Of steps of different depths, whose losses of blocks the file alone has."""
    ((rows, depths),) = run_distributed(rows_of_drawn_depths, 1, str(tmp_path / "drawn.jsonl"), "uniform")
    assert len(set(depths)) > 2 and len(rows) == 10 and {len(row) for row in rows} == {len(rows[0])}
    assert "lm loss" in rows[0] and "block" not in rows[0]
    records = [json.loads(line) for line in (tmp_path / "drawn.jsonl").read_text().splitlines()]
    assert [len(blocks_of(record)) for record in records] == depths
    ((rows, depths),) = run_distributed(rows_of_drawn_depths, 1, str(tmp_path / "same.jsonl"), "fixed")
    assert set(depths) == {4} and "block 1  block 3  block 4" in rows[0] and len(rows[1]) == len(rows[0])


VALIDATION = (
    " validation loss at iteration 6 | lm loss value: 4.4E+00 | lm loss PPL: 8.5E+01 | token cosine value: 3.0E-01 | "
    "token cosine PPL: 1.3E+00 | lm loss block 1 value: 4.4E+00 | lm loss block 1 PPL: 8.5E+01 | "
)


def test_only_losses_have_a_perplexity() -> None:
    assert console.NO_PERPLEXITY.sub("", VALIDATION) == VALIDATION.replace("token cosine PPL: 1.3E+00 | ", "")


# --- a run ----------------------------------------------------------------------------------------------------------


def shown_in_worker(argv: list[str], **options: Any) -> tuple[str, str]:
    """What this rank's part of a run shows on stdout and stderr, as the command has it."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = shown = io.StringIO(), io.StringIO()
    try:
        console.install()
        assert in_worker(argv, **options) is None
    finally:
        console._current = None
        sys.stdout, sys.stderr = streams
    return shown[0].getvalue(), shown[1].getvalue()


EVALUATED = ["--eval-iters", "1", "--eval-interval", "3", "--log-interval", "2"]


def test_a_pipe_gets_megatrons_lines_and_the_log_the_rest(tmp_path: Path) -> None:
    ranks = run_distributed(shown_in_worker, 2, [*FLAGS, *RECURSION, *EVALUATED, *save_to(tmp_path)], timeout=120)
    assert [err for _, err in ranks] == ["", ""]
    first, last = (out.splitlines() for out, _ in ranks)
    assert f"log: {tmp_path / 'logs'}" in first[0] and sum("recursion plan: core" in line for line in first) == 1
    logged = [line for line in last if re.search(r"\] iteration +\d+/ +6 \| consumed samples:", line)]
    assert len(logged) == 4  # 1, 2, 4, 6
    assert all(re.search(r"\| lm loss: \S+ \| halt loss: \S+ \| .*total loss: \S+ \|", line) for line in logged)
    evaluated = [line for line in last if " loss at iteration " in line]
    assert [line.split(" | ")[0] for line in evaluated] == [
        " validation loss at iteration 3", " validation loss at iteration 6",
        " validation loss at iteration 6 on test set",
    ]  # fmt: skip
    assert last[-1].startswith("      ") and any(line.startswith("done: iterations 1 to 6 of 6") for line in last)
    (closing,) = (line.split() for line in last if line.startswith("  lm loss  "))
    assert closing[3:8] + closing[9:] == "over iterations 1 to 2, over iterations 5 to 6".split()
    _, start, _, end = (float(line.split("| lm loss: ")[1].split()[0]) for line in logged)
    assert [float(closing[2]), float(closing[8])] == pytest.approx([start, end], abs=6e-4)
    assert len(first) + len(last) < 50
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "end of arguments" in log and "recursion plan: core" in log
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["tokens"] for record in trained] == [128, 256, 384]
    for record in trained:
        assert record["tokens per second"] * record["seconds"] == pytest.approx(4 * 16)


def test_a_terminal_gets_a_line_an_interval(tmp_path: Path) -> None:
    flags = [*FLAGS, *RECURSION, *EVALUATED, *save_to(tmp_path), "--log-style", "compact"]
    ((out, _),) = run_distributed(shown_in_worker, 1, flags, timeout=120)
    lines = out.splitlines()
    assert max(map(len, lines)) <= max(WIDTH, len(lines[0]))
    starts = [line.split()[0] for line in lines]
    assert [start for start in starts if start in ("2/6", "4/6", "6/6")] == ["2/6", "4/6", "6/6"]
    assert sum(line.startswith("held out at iteration") for line in lines) == 2
    assert sum(line.startswith("checkpoint of iteration") for line in lines) == 2
    assert not any("lm loss value" in line or "consumed samples" in line for line in lines)


def test_a_run_that_only_evaluates_says_so(tmp_path: Path) -> None:
    flags = [*FLAGS, *RECURSION, *EVALUATED, *save_to(tmp_path), "--log-style", "compact"]
    assert train(*flags, flags=(), recursion=()) is None
    before = (tmp_path / "metrics.jsonl").read_text()
    ((out, _),) = run_distributed(shown_in_worker, 1, [*flags, "--train-iters", "9", "--skip-train"], timeout=120)
    assert "nothing was trained: iteration 6 of 9 is the last one" in out and "test set at iteration 6" in out
    added = (tmp_path / "metrics.jsonl").read_text().removeprefix(before).splitlines()
    assert [json.loads(line)["kind"] for line in added] == ["run", "valid", "test"]
    assert train(*flags, flags=(), recursion=()) is None, "the same command, of a run at its end"
    added = (tmp_path / "metrics.jsonl").read_text().removeprefix(before).splitlines()[3:]
    assert [json.loads(line)["kind"] for line in added] == ["run", "valid", "test"]
    with (tmp_path / "logs" / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which the runs have left


# --- how it ends ----------------------------------------------------------------------------------------------------


def say_in_worker() -> bool:
    import torch

    os.environ |= {"RANK": str(torch.distributed.get_rank()), "WORLD_SIZE": str(torch.distributed.get_world_size())}
    try:
        return ending._is_the_one_that_speaks()
    finally:
        ending._stores.clear()
        del os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_one_rank_speaks() -> None:
    assert sorted(run_distributed(say_in_worker, 4)) == [False, False, False, True]


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs an ending in this process; returns (exit code, stderr, elastic error file, log)."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(ending, "leave_at_once", sys.exit)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    shown = sys.stderr
    console.install()
    console.begin(None, str(tmp_path), timers=False)

    def end(how: Any, error: Exception) -> tuple[int, str, dict[str, Any], str]:
        try:
            raise error
        except Exception as caught:
            with pytest.raises(SystemExit) as stop:
                how(caught)
        recorded = json.loads((tmp_path / "error.json").read_text())["message"]
        return stop.value.code, shown.getvalue(), recorded, (tmp_path / "logs" / "rank-0.log").read_text()  # type: ignore[attr-defined,return-value]

    yield end
    console._current = None


def test_a_mistake_ends_in_a_sentence_that_torchrun_repeats(ended: Any) -> None:
    code, err, recorded, log = ended(ending.end_with_sentence, UserError("--lr is -1; give a positive number."))
    assert (code, err) == (2, "error: --lr is -1; give a positive number.\n")
    assert recorded["extraInfo"]["py_callstack"] == recorded["message"] == "--lr is -1; give a positive number."
    assert "Traceback" not in log


def test_a_defect_keeps_its_traceback_in_the_file_that_the_last_line_names(ended: Any, tmp_path: Path) -> None:
    code, err, recorded, log = ended(ending.end_with_traceback, RuntimeError("CUDA out of\nmemory."))
    assert code == 1 and err.count("\n") == 1 and "Traceback" not in err
    assert "RuntimeError: CUDA out of memory; the traceback is in" in err
    assert str(tmp_path / "logs" / "rank-0.log") in err and "Traceback (most recent call last)" in log
    assert "Traceback" in recorded["extraInfo"]["py_callstack"]


INTERRUPTED = """
import os, signal, time
from megatron_recursive.training import ending
ending.watch_for_interrupts()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(30)
"""


def test_ctrl_c_before_training_is_a_sentence() -> None:
    done = run_command([sys.executable, "-c", INTERRUPTED], timeout=25)
    assert done.returncode == ending.EXIT_INTERRUPTED and done.stdout == ""
    assert done.stderr == "stopped by Ctrl-C before training began; nothing was trained.\n"


def said_of_checkpoints(save: Path) -> str:
    from megatron_recursive.training.checkpoint_folders import last_complete

    run = Namespace(save=str(save), load=str(save), non_persistent_ckpt_type=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "_arguments", lambda: run)
        return f"{ending._what_goes_on()}: {last_complete(save)}"


@pytest.mark.parametrize(("tracker", "named"), [("10", 10), ("30", 20), ("", 20)])
def test_the_last_checkpoint_is_the_tracker_s_where_it_is_complete(tmp_path: Path, tracker: str, named: int) -> None:
    """Another is of a run that this one went back behind, or of a save that was cut short."""
    for iteration in (10, 20):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
        (tmp_path / f"iter_{iteration:07d}" / "metadata.json").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    (said,) = run_distributed(said_of_checkpoints, 1, tmp_path)
    assert f"the last checkpoint is iteration {named} in" in said and said.endswith(f"complete one there is {named}")


def test_a_second_run_in_a_folder_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs" / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        said = run_distributed(in_worker, 2, [*FLAGS, *RECURSION, *save_to(tmp_path)], timeout=120)
    assert said == [f"Another run is saving into --save {tmp_path}; wait for its end, or name another folder."] * 2
    assert not (tmp_path / "iter_0000003").exists()


def failed_saves(save: Path, codes: list[int | None], free: int) -> list[str]:
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_recursive.training.patches import checkpoints
    from megatron_recursive.training.progress import Progress

    plans: Any = Namespace(growth=Namespace(config_after=lambda _: None), config=None)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        run = Namespace(save=str(save), rank=0, async_save=False, train_only=None, non_persistent_ckpt_type=None)
        patch.setattr(checkpoints, "get_args", lambda: run)
        patch.setattr(checkpoints.shutil, "disk_usage", lambda _: Namespace(free=free))
        for code in codes:

            def call(code: int | None = code) -> None:
                if code is not None:
                    raise OSError(code, os.strerror(code))
                raise CheckpointException("", {0: (RuntimeError("Worker failure"), None)})  # type: ignore[dict-item]

            with pytest.raises(UserError) as refused:
                checkpoints._save({}, plans, Progress(), call, {"iteration": 3})
            said.append(str(refused.value))
    return said


def test_room_is_asked_for_where_it_is_lacking(tmp_path: Path) -> None:
    codes = [errno.ENOSPC, errno.EDQUOT, errno.EACCES, None]
    (with_room,) = run_distributed(failed_saves, 1, tmp_path, codes, 10**9)
    assert ["; make room and start the same command" in said for said in with_room] == [True, True, False, False]
    assert "Permission denied); mend that and start the same command again" in with_room[2]
    ((unsaid,),) = run_distributed(failed_saves, 1, tmp_path, [None], 0)
    assert "(RuntimeError: Worker failure); make room and" in unsaid
    (said,) = run_distributed(_refused_metrics, 1, tmp_path)
    assert said.startswith(f"The metrics file {tmp_path} cannot be written (Is a directory); mend that and start the")


def _refused_metrics(file: Path) -> str:
    from megatron_recursive.training.metrics_log import append_metrics

    with pytest.raises(UserError) as refused:
        append_metrics(str(file), {"kind": "train"})
    return str(refused.value)


@pytest.mark.grid
def test_ctrl_c_says_what_goes_on_and_leaves_the_trace(tmp_path: Path) -> None:
    server = RunServer(tmp_path)
    try:
        saves = save_to(tmp_path / "run", 2)
        profile = ["--profile", "--profile-step-start", "1", "--profile-step-end", "5000"]
        run = server.start([*FLAGS, *RECURSION, "--train-iters", "5000", *saves, *profile], world_size=2)
        tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
        wait_until(lambda: tracker.exists() and int(tracker.read_text() or 0) >= 2, run)
        for pid in run.pids:
            os.killpg(pid, signal.SIGINT)
        assert run.wait(timeout=30) == [ending.EXIT_INTERRUPTED] * 2, run.tail()
        said = [line for log in run.logs for line in log.read_text().splitlines() if "Ctrl-C" in line]
        assert len(said) == 1 and re.search(r"stopped by Ctrl-C at iteration \d+; the last checkpoint is iter", said[0])
        assert said[0].endswith("and the same command goes on from there.")
        assert not any("Traceback" in log.read_text() for log in run.logs)
        trace = json.loads(gzip.decompress((tmp_path / "run" / "torch_profile" / "rank-0.json.gz").read_bytes()))
        assert any("scaled_dot_product" in str(event.get("name")) for event in trace["traceEvents"])
    finally:
        server.close()
