"""What a run shows of itself: throughput, timers, memory, traces, bad results, and what made a checkpoint."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.accounting import ModelShape, flops_per_token
from megatron_recursive.plan import RecursionConfig, build_plan
from tests.distributed import run_command, run_distributed
from tests.grids import grid
from tests.quick_start import ALL
from tests.unit_tests.training.runs import (
    FLAGS,
    RECURSION,
    SCRIPT,
    copy_checkpoint,
    in_worker,
    losses_of,
    refusals,
    save_to,
    train,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LOGGED = ["--log-throughput", "--log-timers-to-tensorboard", "--log-memory-to-tensorboard", "--timing-log-level", "2"]
MB = 1024 * 1024


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar of the event files in a folder, by iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# --- throughput and timers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "stages"), grid([(1, 1), (4, 2)], quick=[(1, 1)]))
def test_throughput_is_the_work_of_the_plan_per_rank_and_second(tmp_path: Path, world_size: int, stages: int) -> None:
    """TFLOP/s times seconds times ranks is the step's work, whatever the layout."""
    sizes = ["--pipeline-model-parallel-size", str(stages), "--global-batch-size", "8"]
    assert train("--tensorboard-dir", tmp_path, *LOGGED, *sizes, world_size=world_size) is None
    found = scalars_of(tmp_path)
    shape = ModelShape(
        num_layers=2, hidden_size=32, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=4, kv_channels=8,
        vocab_size=128, seq_length=16, learned_positions=16,
    )  # fmt: skip
    knobs = RecursionConfig(num_refinement_blocks=2, num_latent_refinements=1).resolved(embedding_init_std=0.02)
    work = flops_per_token(shape, build_plan(knobs)).total * 16 * 8
    assert len(found["iteration-time"]) >= 4
    for iteration, seconds in found["iteration-time"].items():
        assert found["throughput"][iteration] * 1e12 * seconds * world_size == pytest.approx(work, rel=1e-4)
    for timer in ("forward-backward-time", "batch-generator-time", "optimizer-time", "forward-compute-time"):
        assert len(found[timer]) >= 4 and min(found[timer].values()) > 0, sorted(found)
    assert "mem-max-allocated-bytes" in found


# --- memory ---------------------------------------------------------------------------------------------------------

WIDE = ["--hidden-size", "64", "--seq-length", "64", "--max-position-embeddings", "64", "--micro-batch-size", "4",
        "--global-batch-size", "16", "--attention-dropout", "0", "--train-iters", "3"]  # fmt: skip
MEMORY_RUNS = {
    "default": ([], 1),
    "llama-like": (
        ["--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
         "--group-query-attention", "--num-query-groups", "2", "--position-embedding-type", "rope"], 1,
    ),
    "cut, no fusion, masks, no dropout": (
        ["--detach-between-refinements", "--hidden-dropout", "0", "--no-bias-gelu-fusion", "--reset-attention-mask",
         "--reset-position-ids"], 1,
    ),
    "replay": (
        ["--recompute-passes", "--recompute-granularity", "full", "--recompute-method", "uniform",
         "--recompute-num-layers", "1", "--num-layers", "4"], 1,
    ),
    "bf16, PP 2, distributed optimizer": (
        ["--bf16", "--pipeline-model-parallel-size", "2", "--use-distributed-optimizer", "--num-layers", "4"], 2,
    ),
    "uneven stages, two phases": (
        ["--pipeline-model-parallel-size", "2", "--num-layers", "4", "--decoder-first-pipeline-num-layers", "3",
         "--pipeline-phases", "two", "--detach-between-refinements"], 2,
    ),
}  # fmt: skip


def reported_and_saved(argv: list[str]) -> dict[str, Any]:
    """A run's theoretical memory by stage, what it printed, and the peak of what autograd saved on this rank."""
    import torch
    from megatron.training import training

    from tests.unit_tests.accounting.test_memory import Saved

    step, peaks, text = training.train_step, [], io.StringIO()

    def train_step(*args: Any, **kwargs: Any) -> Any:
        saved = Saved(args[2][0])
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            result = step(*args, **kwargs)
        peaks.append(saved.peak)
        return result

    training.train_step = train_step
    try:
        with contextlib.redirect_stdout(text):
            assert in_worker(argv) is None
    finally:
        training.train_step = step
    said = [line for line in text.getvalue().splitlines() if line.startswith("Theoretical memory")]
    return {"said": said, "peak": peaks[-1]}


def in_mb(line: str) -> dict[str, float]:
    """The parts of a printed line, ``name=1.00 MB, ...``."""
    parts = (part.split("=") for part in line.split(": ", 1)[1].split(", "))
    return {name: float(size.removesuffix(" MB")) for name, size in parts}


@pytest.mark.parametrize("name", grid(MEMORY_RUNS, quick=[]))
def test_reported_activations_are_what_autograd_saves(name: str) -> None:
    """Within 10% plus half a printed digit; the states are held by Python, and are no part of what autograd saves."""
    flags, world_size = MEMORY_RUNS[name]
    ranks = run_distributed(reported_and_saved, world_size, [*FLAGS, *RECURSION, *WIDE, *flags], timeout=120)
    stages = [in_mb(line) for line in ranks[0]["said"] if "pipeline stage" in line]
    (total,) = {line for line in ranks[0]["said"] if "footprints" in line}
    assert len(set(ranks[0]["said"])) == world_size + 1
    for rank, measured in enumerate(ranks):
        stage = stages[rank]
        expected = stage["recorded passes"] + max(stage.get("heads", 0.0), stage.get("replay", 0.0))
        assert measured["peak"] / MB == pytest.approx(expected, rel=0.1, abs=0.015), (stage, measured["peak"] / MB)
    most = max(stages[:world_size], key=lambda stage: stage["total"])
    footprint = in_mb(total)
    assert footprint["total"] == most["total"] and footprint["weight and optimizer"] == most["weight and optimizer"]


# --- traces ---------------------------------------------------------------------------------------------------------


@pytest.mark.grid
def test_profile_leaves_the_asked_ranks_trace_beside_the_run(tmp_path: Path) -> None:
    steps = ["--profile", "--profile-step-start", "2", "--profile-step-end", "4", "--profile-ranks", "1"]
    assert train("--save", tmp_path / "run", "--save-interval", "100", *steps, world_size=2) is None
    (trace,) = tmp_path.rglob("rank-*")
    assert trace == tmp_path / "run" / "torch_profile" / "rank-1.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"aten::scaled_dot_product_attention", "aten::linear"} & names
    assert not list(tmp_path.rglob("events.out*"))
    events = ["--tensorboard-dir", str(tmp_path / "board" / "events"), "--use-pytorch-profiler"]
    assert train(*events, *steps[:-2]) is None
    assert (tmp_path / "board" / "torch_profile" / "rank-0.json.gz").stat().st_size > 1000


@pytest.mark.parametrize("how", grid(["exit", "fault"], quick=[]))
def test_an_exit_inside_the_window_leaves_the_trace(tmp_path: Path, how: str) -> None:
    """As a command, which ended in a segmentation fault once. The fault is a file in the way of a folder."""
    exits = ["--exit-interval", "3"] if how == "exit" else []
    save = ["--save", tmp_path / "run", "--save-interval", "3", *exits]
    if how == "fault":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "iter_0000003").write_text("in the way")
    window = ["--profile", "--profile-step-start", "2", "--profile-step-end", "5"]
    result = run_command([sys.executable, SCRIPT, *FLAGS, *RECURSION, *save, *window], timeout=240)
    assert result.returncode == 0 if how == "exit" else result.returncode > 0, result.stderr[-2000:]
    trace = json.loads(gzip.decompress((tmp_path / "run" / "torch_profile" / "rank-0.json.gz").read_bytes()))
    assert any("scaled_dot_product" in str(event.get("name")) for event in trace["traceEvents"])


REFUSED = {
    "--profile --profile-step-end 6": "--profile needs --save or --tensorboard-dir",
    "--profile --save x --save-interval 9": "--profile-step-start 10 must lie before --profile-step-end",
    "--profile --profile-step-start 2 --profile-step-end 7": "--profile-step-end 7 lies behind the last iteration",
    "--profile --profile-step-start 2 --profile-step-end 4 --profile-ranks 1": "--profile-ranks 1 is none of the 1",
}


def test_a_profile_that_would_leave_nothing_is_refused() -> None:
    commands = []
    for flags, expected in REFUSED.items():
        more = ["--profile-step-start", "2"] if expected.startswith("--profile needs") else []
        more += ["--profile-step-end", "9"] if "must lie before" in expected else []
        commands.append([*flags.split(), *more])
    for (flags, expected), said in zip(REFUSED.items(), refusals(commands), strict=True):
        assert expected in said and said.endswith("."), (flags, said)


# --- bad results ----------------------------------------------------------------------------------------------------

POISON = """
import sys
sys.path.insert(0, {repository!r})
import torch
from megatron_recursive.backends import cpu

cpu.install()
from megatron.training import training
from megatron_recursive.training import pretrain

step = training.train_step


def train_step(*args, iteration, **kwargs):
    if iteration == 3 and torch.distributed.get_rank() == 1:
        next(args[2][0].parameters()).data[5] = float("nan")
    return step(*args, iteration=iteration, **kwargs)


if __name__ == "__main__":
    training.train_step = train_step
    pretrain.main()
"""


MODES = [pytest.param("validate_results", 16, marks=pytest.mark.grid),
         pytest.param("disabled", 17, marks=pytest.mark.heavy)]  # fmt: skip


@pytest.mark.parametrize(("mode", "exit_code"), MODES)
def test_a_nan_in_a_weight_stops_the_run_with_a_sentence(tmp_path: Path, mode: str, exit_code: int) -> None:
    """On one rank of two; the sentence names that rank and the iteration, and torchrun the exit code."""
    script = tmp_path / "poisoned.py"
    script.write_text(POISON.format(repository=str(SCRIPT.parents[2])))
    flags = [*FLAGS, *RECURSION, "--rerun-mode", mode]
    result = run_command([*TORCHRUN, script, *flags], timeout=240)
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and f"exitcode  : {exit_code}" in result.stderr, result.stderr[-3000:]
    assert len(said) == 1 and said[0].endswith("."), result.stderr[-3000:]
    assert said[0].startswith("error: Rank 1 at iteration 4: found NaN in local forward loss calculation"), said
    assert "Traceback" not in result.stderr.split("torch/distributed/run.py")[0].split(said[0])[0]


# --- run.json -------------------------------------------------------------------------------------------------------


@pytest.mark.grid
def test_a_run_can_be_made_again_from_its_record(tmp_path: Path) -> None:
    """The command in run.json, run by a shell, gives the same losses: two ranks, dropout on."""
    assert train(*save_to(tmp_path, 3), f"--tensorboard-dir={tmp_path / 'events'}", world_size=2,
                 mock_documents=ALL) is None  # fmt: skip
    record = json.loads((tmp_path / "run.json").read_text())
    for folder, iteration in (("iter_0000003", 3), ("iter_0000006", 6), (".", 6)):
        assert json.loads((tmp_path / folder / "run.json").read_text()) == {**record, "iteration": iteration}
    assert not list(tmp_path.rglob("run.json*partial*"))
    assert record["world"] == {"processes": 2, "processes a node": 2, "tensor parallel": 1, "pipeline parallel": 1,
                               "data parallel": 2}  # fmt: skip
    assert record["arguments"]["hidden_size"] == 32 and record["arguments"]["params_dtype"] == "torch.float32"
    assert record["recursion"]["num_refinement_blocks"] == 2 and len(record["plan"]["passes"]) == 4
    assert {"python", "torch", "megatron-recursive"} <= set(record["versions"])
    assert record["versions"]["megatron-core"].startswith("0.19.") and record["started from"] is None
    assert "\n" not in record["reproduce"] and "--load" not in record["reproduce"]
    again = run_command(["bash", "-c", record["reproduce"]], timeout=240, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert losses_of(tmp_path / "reproduced") == losses_of(tmp_path) and len(losses_of(tmp_path)) == 6
    assert list((tmp_path / "reproduced" / "tensorboard").glob("events.out*"))


@pytest.mark.grid
def test_the_record_of_a_resumed_run_starts_where_that_run_did(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second one"
    assert train(*save_to(first, 2)) is None
    copy_checkpoint(first, second, 4)
    assert train(*save_to(second, 2)) is None
    record = json.loads((second / "run.json").read_text())
    assert record["started from"] == str(second / "iter_0000004")
    argv = shlex.split(record["reproduce"])
    argv = argv[argv.index(str(SCRIPT)) + 1 :]
    assert argv[-2:] == ["--ckpt-step", "4"]
    assert train(*argv, flags=(), recursion=()) is None
    assert losses_of(second / "reproduced") == losses_of(second) and sorted(losses_of(second)) == [5, 6]


def straggler_starts(argv: list[str]) -> tuple[str | None, list[bool]]:
    from megatron_recursive.training.forward_step import STRAGGLER

    starts: list[bool] = []

    def start() -> None:
        starts.append(STRAGGLER.bdata)
        STRAGGLER.bdata = False  # as its own

    STRAGGLER.start = start
    try:
        return in_worker(argv), starts
    finally:
        STRAGGLER.start = STRAGGLER.null_method


@pytest.mark.grid
def test_the_straggler_detector_times_data_and_model() -> None:
    """--log-straggler divides by this time. The detector needs CUDA events, so that its start is watched here."""
    ((said, starts),) = run_distributed(straggler_starts, 1, [*FLAGS, *RECURSION, "--train-iters", "2"], timeout=120)
    assert said is None
    assert starts == [True, False] * 4, "data, then model, of two micro-batches in two iterations"


# --- printed losses -------------------------------------------------------------------------------------------------


def printed_losses(argv: list[str]) -> dict[int, float]:
    """Iteration to the loss on the line that Megatron prints for it."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert in_worker(argv) is None
    lines = re.findall(r"iteration +(\d+)/.* lm loss: ([\d.E+-]+) ", text.getvalue())
    return {int(iteration): float(loss) for iteration, loss in lines}


def test_every_printed_loss_is_of_its_own_interval(tmp_path: Path) -> None:
    """The second one of a process too; where the first line falls within an interval, that one is whole."""
    argv = [*FLAGS, *RECURSION, "--metrics-file", str(tmp_path / "metrics.jsonl")]
    (printed,) = run_distributed(printed_losses, 1, argv, timeout=120)
    losses = losses_of(tmp_path)
    assert printed == pytest.approx(losses, rel=1e-6) and sorted(printed) == [1, 2, 3, 4, 5, 6]
    (printed,) = run_distributed(printed_losses, 1, [*argv, "--log-interval", "3"], timeout=120)
    means = {n: sum(losses[i] for i in range(n - 2, n + 1)) / 3 for n in (3, 6)}
    assert printed == pytest.approx({1: losses[1], **means}, rel=1e-6)


def test_a_run_that_is_shorter_than_an_interval_is_logged(tmp_path: Path) -> None:
    argv = [*FLAGS, *RECURSION, "--metrics-file", str(tmp_path / "metrics.jsonl"), "--log-interval", "100"]
    assert run_distributed(in_worker, 1, argv, timeout=120) == [None]
    assert sorted(losses_of(tmp_path)) == [6]
