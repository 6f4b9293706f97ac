"""Whole training runs on several pipeline stages: one checkpoint, every layout, the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import REPOSITORY, run_distributed
from tests.grids import grid
from tests.unit_tests.training.runs import FLAGS, SCRIPT, copy_checkpoint, metrics_of, one_by_one, save_to, train

RECURSION = ["--num-refinement-blocks", "2", "--num-latent-refinements", "2"]
LAST = 7  # iteration
# Four layers for four stages, four micro-batches, dropout off: random numbers differ from layout to layout.
DEEP = ["--num-layers", "4", "--global-batch-size", "8", "--train-iters", str(LAST), "--hidden-dropout", "0",
        "--attention-dropout", "0", "--eval-iters", "1", "--eval-interval", "4", "--clip-grad", "0.05"]  # fmt: skip
LAYOUTS = {"PP 2": (1, 2), "TP 2 x PP 2": (2, 2), "PP 4": (1, 4)}
Whole = Callable[[str], dict[int, dict[str, Any]]]
DETACH, FULL = "--detach-between-refinements", "--no-detach-between-refinements"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations on one stage."""
    folder = tmp_path_factory.mktemp("start")
    assert train(*save_to(folder, 2), *DEEP, "--exit-interval", "2", recursion=RECURSION) is None
    return folder


def run_layout(start: Path, folder: Path, layout: tuple[int, int], *flags: str) -> dict[int, dict[str, Any]]:
    """Go on from the checkpoint's iteration 2 to the last one at (TP, PP)."""
    tp, pp = layout
    copy_checkpoint(start, folder, 2)
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    argv = [*save_to(folder, LAST), *DEEP, "--no-load-rng", *sizes, *flags]
    said = train(*argv, recursion=RECURSION, world_size=tp * pp)
    assert said is None, said
    return metrics_of(folder)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """By gradient flow: what one process gives, made when it is looked at."""

    @cache
    def of(gradient: str) -> dict[int, dict[str, Any]]:
        return run_layout(checkpoint, tmp_path_factory.mktemp("whole"), (1, 1), gradient)

    return of


@pytest.mark.parametrize(
    ("layout", "gradient"),
    grid([("PP 2", DETACH), ("PP 2", FULL), ("PP 4", DETACH), ("PP 4", FULL), ("TP 2 x PP 2", FULL)], quick=[]),
)
def test_every_layout_goes_on_with_the_same_losses(
    checkpoint: Path, whole: Whole, tmp_path: Path, layout: str, gradient: str
) -> None:
    run = run_layout(checkpoint, tmp_path, LAYOUTS[layout], gradient)
    assert sorted(run) == list(range(3, LAST + 1))
    for iteration, metrics in whole(gradient).items():
        for key in ("lm loss", "halt loss", "total loss", "lm loss block 1", "grad norm"):
            # What the log line prints has seven digits.
            assert run[iteration][key] == pytest.approx(metrics[key], rel=2e-6), (iteration, key)


@pytest.mark.grid
def test_a_checkpoint_of_two_stages_goes_on_at_tensor_parallel_two_and_on_one_stage(
    checkpoint: Path, whole: Whole, tmp_path: Path
) -> None:
    copy_checkpoint(checkpoint, tmp_path / "pp2", 2)
    flags = [*DEEP, "--no-load-rng"]
    two_stages = ["--pipeline-model-parallel-size", "2", "--exit-interval", "4"]
    assert train(*save_to(tmp_path / "pp2", 4), *flags, *two_stages, recursion=RECURSION, world_size=2) is None
    for name, more, ranks in (("one", [], 1), ("tp2", ["--tensor-model-parallel-size", "2"], 2)):
        copy_checkpoint(tmp_path / "pp2", tmp_path / name, 4)
        assert train(*save_to(tmp_path / name, LAST), *flags, *more, recursion=RECURSION, world_size=ranks) is None
        run = metrics_of(tmp_path / name)
        assert sorted(run) == list(range(5, LAST + 1))
        for iteration, metrics in run.items():
            assert metrics["lm loss"] == pytest.approx(whole(FULL)[iteration]["lm loss"], rel=2e-6)


REFUSED = {
    "--global-batch-size 2": "--pipeline-model-parallel-size",
    "--eval-global-batch-size 2": "--eval-global-batch-size",
    "--num-layers 3": "--decoder-first-pipeline-num-layers",
    "--num-layers-per-virtual-pipeline-stage 1": "--num-layers-per-virtual-pipeline-stage",
    "--cuda-graph-impl local": "--cuda-graph-impl",
}


def test_what_the_ring_cannot_do_is_refused_before_any_rank_waits() -> None:
    argvs = [[*FLAGS, *RECURSION, "--pipeline-model-parallel-size", "2", *flags.split()] for flags in REFUSED]
    for sentences in run_distributed(one_by_one, 2, argvs, timeout=120):
        for (flags, said), sentence in zip(REFUSED.items(), sentences, strict=True):
            assert sentence is not None and said in sentence and sentence.endswith("."), (flags, sentence)


@pytest.mark.heavy
def test_a_rank_that_dies_takes_the_run_down() -> None:
    argv = [*FLAGS, *RECURSION, "--pipeline-model-parallel-size", "2", "--train-iters", "100000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    with subprocess.Popen([*command, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          start_new_session=True, cwd=REPOSITORY,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:  # fmt: skip
        assert run.stdout is not None
        for line in run.stdout:
            if "iteration        5/" in line:
                break
        ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(ranks[0]), signal.SIGKILL)
        start = time.monotonic()
        text = run.stdout.read()
        assert run.wait(timeout=60) != 0 and time.monotonic() - start < 60
    assert "Signal 9 (SIGKILL)" in text
