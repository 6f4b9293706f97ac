"""Deep supervision with a ramp: the same at every layout and after a resume, told by block, and stored."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.deep_supervision import block_weights, share_of
from tests.grids import grid
from tests.unit_tests.training.runs import copy_checkpoint, metrics_of, records_of, save_to, train

# Iterations 1 to 3 are those of the last block alone: passes without gradient, and two phases.
RAMP, STEPS = (2, 5), 6
HOW = ["--global-batch-size", "20", "--train-iters", str(STEPS), "--hidden-dropout", "0",
       "--attention-dropout", "0", "--adam-eps", "1e-4", "--seed", "3", "--eval-iters", "1",
       "--use-distributed-optimizer"]  # fmt: skip
DEEP = ["--num-refinement-blocks", "3", "--num-latent-refinements", "1", "--enable-deep-supervision",
        "--deep-supervision-schedule", "linear_decay", "--deep-supervision-warmup", *map(str, RAMP)]  # fmt: skip
PLANS = {"apart": [*DEEP, "--detach-between-refinements"], "all blocks": [*DEEP, "--halt-supervision", "last"]}
PP2, DP = ["--pipeline-model-parallel-size", "2"], ["--overlap-grad-reduce"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "PP 2 x DP 2": (4, [*PP2, *DP, "--overlap-param-gather", "--ddp-bucket-size", "2000", "--pipeline-phases", "two",
                        "--pipeline-window", "2"]),
    "TP 2, SP": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel", *DP]),
}  # fmt: skip


@cache
def alone(plan: str) -> Path:
    """One process, saved after its first and its third step: fresh weights differ from layout to layout."""
    folder = Path(mkdtemp())
    assert train(*save_to(folder, 1), *HOW, "--exit-interval", "1", recursion=PLANS[plan]) is None
    assert train(*save_to(folder, 3), *HOW, recursion=PLANS[plan]) is None
    return folder


# Where states are cut makes no difference to tensor parallelism, which lies within a pass.
@pytest.mark.parametrize(("plan", "layout"), grid([*((plan, "PP 2 x DP 2") for plan in PLANS),
                                                   ("all blocks", "TP 2, SP")], []))
def test_every_layout_trains_as_one_process(plan: str, layout: str, tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    start = ["--load", alone(plan), "--ckpt-step", "1", "--metrics-file", tmp_path / "metrics.jsonl", "--no-load-rng"]
    assert train(*start, *HOW, *flags, recursion=PLANS[plan], world_size=ranks) is None
    expected, found = metrics_of(alone(plan)), metrics_of(tmp_path)
    del expected[1]
    for step, record in expected.items():
        for name in ("lm loss", "total loss", "grad norm"):
            assert found[step][name] == pytest.approx(record[name], rel=1e-5), (step, name)


def test_each_step_tells_the_loss_of_every_block_and_their_weighed_sum() -> None:
    for step, record in metrics_of(alone("all blocks")).items():
        losses = [record.get(f"lm loss block {block}", 0.0) for block in (1, 2, 3)]
        share = share_of(RAMP, step - 1)
        weights = block_weights(RecursionConfig(enable_deep_supervision=True,
                                                deep_supervision_schedule="linear_decay"), 3, share)  # fmt: skip
        total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) + record["halt loss"]
        assert record["lm loss"] == losses[2] and record["total loss"] == pytest.approx(total, rel=1e-6)
        assert all(losses) == (share > 0)
        assert record["FLOPs"] > 0
    (held_out,) = records_of(alone("all blocks"), "valid")[-1:]
    assert all(held_out[f"lm loss block {block}"] > 0 for block in (1, 2, 3))


@pytest.mark.grid
def test_a_resume_goes_on_within_the_ramp(tmp_path: Path) -> None:
    copy_checkpoint(alone("apart"), tmp_path, 3)
    assert train(*save_to(tmp_path, 3), *HOW, recursion=["--use-checkpoint-args"]) is None
    found, expected = metrics_of(tmp_path), metrics_of(alone("apart"))
    assert all(found[step] == expected[step] for step in (4, 5, 6))


def test_a_ramp_that_training_does_not_reach_is_refused(tmp_path: Path) -> None:
    said = train(*HOW, "--train-iters", "4", recursion=DEEP)
    assert said is not None and said.startswith("--deep-supervision-warmup 2 5 ends behind the 4 iterations")
