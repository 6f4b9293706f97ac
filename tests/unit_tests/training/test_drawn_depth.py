"""Training at a depth drawn for each step: the same at every layout, after a resume, and as the records say."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.grids import grid
from tests.unit_tests.training.runs import metrics_of, save_to, train

STEPS = 8
# Ten micro-batches of one process are five a replica, in windows of two and three.
HOW = ["--num-layers", "4", "--global-batch-size", "20", "--train-iters", str(STEPS), "--hidden-dropout", "0",
       "--attention-dropout", "0", "--adam-eps", "1e-4", "--seed", "3"]  # fmt: skip
DRAWN = ["--recursion-family", "recurrent", "--num-recurrences", "3", "--recurrence-distribution", "poisson-lognormal",
         "--max-recurrence", "6", "--backprop-depth", "2"]  # fmt: skip
PLANS = {
    "core alone": [*DRAWN, "--injection", "add"],  # begins with passes without gradient: two phases
    "prelude and coda": [*DRAWN, "--num-prelude-layers", "1", "--num-coda-layers", "1", "--injection", "concat",
                         "--state-init", "sampled", "--recurrence-step", "mean"],
}  # fmt: skip
PP2, DP = ["--pipeline-model-parallel-size", "2"], ["--use-distributed-optimizer", "--overlap-grad-reduce"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "PP 2 x DP 2": (4, [*PP2, *DP, "--overlap-param-gather", "--ddp-bucket-size", "2000", "--pipeline-phases", "two",
                        "--pipeline-window", "2"]),
    "TP 2 x PP 2, SP": (4, [*PP2, "--tensor-model-parallel-size", "2", "--sequence-parallel", *DP]),
    "DP 2, full recompute": (2, [*DP, "--ddp-bucket-size", "2000", "--recompute-granularity", "full",
                                 "--recompute-method", "uniform", "--recompute-num-layers", "1"]),
}  # fmt: skip
QUICK = [("core alone", "PP 2 x DP 2")]


@cache
def alone(plan: str) -> Path:
    folder = Path(mkdtemp())
    assert train(*save_to(folder, 4), *HOW, recursion=PLANS[plan]) is None
    return folder


@pytest.mark.parametrize(("plan", "layout"), grid([(plan, layout) for plan in PLANS for layout in LAYOUTS], QUICK))
def test_every_layout_trains_as_one_process(plan: str, layout: str, tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    assert train(*save_to(tmp_path, STEPS), *HOW, *flags, recursion=PLANS[plan], world_size=ranks) is None
    expected, found = metrics_of(alone(plan)), metrics_of(tmp_path)
    depths = [record["recurrence"] for record in expected.values()]
    assert 1 in depths and max(depths) >= 4 and len(depths) == STEPS
    for step, record in expected.items():
        for name in ("lm loss", "grad norm", "recurrence"):
            assert found[step][name] == pytest.approx(record[name], rel=1e-5), (step, name)
