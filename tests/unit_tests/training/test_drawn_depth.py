"""Training at a depth drawn for each step: the same at every layout, after a resume, and as the records say."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from megatron_recursive.accounting import ModelShape, flops_per_token
from megatron_recursive.plan import RecursionConfig, StepPlans, build_plan
from tests.grids import grid
from tests.unit_tests.training.runs import copy_checkpoint, metrics_of, records_of, save_to, train

START, STEPS = 1, 9
# Ten micro-batches of one process are five a replica, in windows of two and three.
HOW = ["--global-batch-size", "20", "--train-iters", str(STEPS), "--hidden-dropout", "0",
       "--attention-dropout", "0", "--adam-eps", "1e-4", "--seed", "11", "--use-distributed-optimizer"]  # fmt: skip
DRAWN = ["--recursion-family", "recurrent", "--num-recurrences", "3", "--recurrence-distribution", "poisson-lognormal",
         "--max-recurrence", "6", "--backprop-depth", "2"]  # fmt: skip
PLANS = {
    "core alone": [*DRAWN, "--injection", "add"],  # begins with passes without gradient: two phases
    "prelude and coda": [*DRAWN, "--num-layers", "4", "--num-prelude-layers", "1", "--num-coda-layers", "1",
                         "--injection", "concat", "--state-init", "sampled", "--recurrence-step", "mean"],
}  # fmt: skip
PP2, DP = ["--pipeline-model-parallel-size", "2"], ["--overlap-grad-reduce"]
DEPTHS = [4, 2, 4, 1, 2, 2, 6, 4, 1]  # what seed 11 draws
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "PP 2 x DP 2": (4, [*PP2, *DP, "--overlap-param-gather", "--ddp-bucket-size", "2000", "--pipeline-phases", "two",
                        "--pipeline-window", "2"]),
    "TP 2 x PP 2, SP": (4, [*PP2, "--tensor-model-parallel-size", "2", "--sequence-parallel", *DP]),
    "DP 2, full recompute": (2, [*DP, "--ddp-bucket-size", "2000", "--recompute-granularity", "full",
                                 "--recompute-method", "uniform", "--recompute-num-layers", "1"]),
}  # fmt: skip
QUICK: list[tuple[str, str]] = []


@cache
def alone(plan: str) -> Path:
    """One process, saved after its first step: fresh weights differ from layout to layout."""
    folder = Path(mkdtemp())
    assert train(*save_to(folder, 1), *HOW, "--exit-interval", "1", recursion=PLANS[plan]) is None
    assert train(*save_to(folder, STEPS), *HOW, recursion=PLANS[plan]) is None
    return folder


@pytest.mark.parametrize(("plan", "layout"), grid([
    *((plan, layout) for plan in PLANS for layout in ("PP 2 x DP 2", "DP 2, full recompute")),
    ("prelude and coda", "TP 2 x PP 2, SP"),
], QUICK))  # fmt: skip
def test_every_layout_trains_as_one_process(plan: str, layout: str, tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    start = ["--load", alone(plan), "--ckpt-step", "1", "--metrics-file", tmp_path / "metrics.jsonl", "--no-load-rng"]
    assert train(*start, *HOW, *flags, recursion=PLANS[plan], world_size=ranks) is None
    expected, found = metrics_of(alone(plan)), metrics_of(tmp_path)
    del expected[START]
    depths = [record["recurrence"] for record in expected.values()]
    assert 1 in depths and max(depths) >= 4 and depths == DEPTHS[START:]
    for step, record in expected.items():
        for name in ("lm loss", "grad norm", "recurrence"):
            assert found[step][name] == pytest.approx(record[name], rel=1e-5), (step, name)


def test_records_say_the_depth_and_what_it_cost(tmp_path: Path) -> None:
    """With a curriculum, of blocks; run.json and a resume have the knobs."""
    flags = ["--recurrence-distribution", "uniform", "--recurrence-curriculum", "linear",
             "--recurrence-curriculum-fraction", "1", "--seed", "5", "--log-interval", "2"]  # fmt: skip
    looped = ["--recursion-family", "looped", "--num-refinement-blocks", "3"]
    assert train(*save_to(tmp_path), *flags, "--eval-iters", "1", "--eval-interval", "3", recursion=looped) is None
    config = RecursionConfig(recursion_family="looped", num_refinement_blocks=3, recurrence_distribution="uniform",
                             recurrence_curriculum="linear", recurrence_curriculum_fraction=1.0,
                             embedding_multiplier=1 / 32**-0.5, init_depth_scaling="held")  # fmt: skip
    plans = StepPlans(config, build_plan(config), seed=5, iterations=6)
    depths = [plans.depth_at(step) for step in range(6)]
    assert depths[:3] == [1, 1, 1] and max(depths[3:]) > 1
    shape = ModelShape(num_layers=2, hidden_size=32, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=4,
                       kv_channels=8, vocab_size=128, seq_length=16, learned_positions=16)  # fmt: skip
    costs = [flops_per_token(shape, plans.plan_at(step)).total * 4 * 16 for step in range(6)]
    for number, record in metrics_of(tmp_path).items():
        assert record["recurrence"] == depths[number - 1] and record["FLOPs"] == pytest.approx(sum(costs[:number]))
    (start,), (valid, _) = records_of(tmp_path, "run"), records_of(tmp_path, "valid")
    assert start["FLOPs per token"] == pytest.approx(sum(costs) / 6 / 64)
    assert json.loads(start["plan"]) == json.loads(plans.plan.to_json()) and "lm loss block 3" in valid
    assert valid["FLOPs"] == pytest.approx(sum(costs[:3]))
    saved = json.loads((tmp_path / "iter_0000003" / "run.json").read_text())
    assert RecursionConfig(**saved["recursion"]) == config
    copy_checkpoint(tmp_path, tmp_path / "resumed", 3)
    assert train(*save_to(tmp_path / "resumed", 6), *flags, recursion=looped) is None
    assert metrics_of(tmp_path / "resumed") == {n: r for n, r in metrics_of(tmp_path).items() if n > 3}
    anew = ["--load", tmp_path, "--finetune", "--save", tmp_path / "anew", "--save-interval", "6"]
    assert train(*anew, *flags, recursion=looped) is None
    for number, record in metrics_of(tmp_path / "anew").items():
        assert record["FLOPs"] == pytest.approx(sum(costs[:number])), "a start counts anew"
