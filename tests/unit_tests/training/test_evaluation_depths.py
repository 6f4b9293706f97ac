"""--eval-depths: each evaluation also reads its batches at other depths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.grids import grid
from tests.unit_tests.training.runs import TIMES, copy_checkpoint, metrics_of, records_of, save_to, train
from tests.unit_tests.training.test_observing import scalars_of

EVALUATING = ["--train-iters", "3", "--eval-iters", "2", "--eval-interval", "1", "--split", "50,50,0",
              "--num-layers", "4", "--hidden-dropout", "0", "--attention-dropout", "0",
              "--init-depth-scaling", "held"]  # fmt: skip
FAMILIES = {  # how it is told its depth, its own depth, and others
    "core": (["--num-latent-refinements", "1"], "--num-refinement-blocks", 2, (1, 3)),
    "looped": (["--recursion-family", "looped", "--exit-gate"], "--num-refinement-blocks", 3, (2,)),
    "recurrent": (
        ["--recursion-family", "recurrent", "--num-prelude-layers", "1", "--num-coda-layers", "1",
         "--recurrence-step", "mean", "--injection", "add", "--state-init", "sampled"], "--num-recurrences", 2, (1, 5),
    ),
}  # fmt: skip


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [{n: v for n, v in each.items() if n not in TIMES} for each in records_of(folder, "valid")]


@pytest.mark.parametrize("family", grid(FAMILIES, quick=[]))
def test_each_depth_has_the_loss_of_a_run_of_that_depth_on_the_same_batches(tmp_path: Path, family: str) -> None:
    """At a learning rate of 0 all runs keep the weights that they start with."""
    recursion, flag, own, others = FAMILIES[family]
    depths = sorted((own, *others))

    def run(name: str, depth: int, *flags: str, **more: Any) -> list[dict[str, Any]]:
        told = ["--metrics-file", str(tmp_path / name / "metrics.jsonl"), *EVALUATING, *flags]
        assert train(*told, recursion=[*recursion, flag, str(depth)], **more) is None
        return evaluations(tmp_path / name)

    asked = ["--eval-depths", ",".join(map(str, depths)), "--lr", "0"]
    found = run("asked", own, *asked, "--tensorboard-dir", str(tmp_path / "events"), *save_to(tmp_path / "start", 1))
    assert len(found) == 3 and len({each["lm loss"] for each in found}) == 1  # the same batches each time
    for depth in depths:
        expected = run(f"at {depth}", depth, "--lr", "0")
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[f"lm loss depth {depth}"] == pytest.approx(theirs["lm loss"], rel=1e-7)
        if depth == own:  # all else is as it is without the flag
            assert [{n: v for n, v in each.items() if "depth" not in n} for each in found] == expected
            assert metrics_of(tmp_path / "asked") == metrics_of(tmp_path / f"at {own}")
    copy_checkpoint(tmp_path / "start", tmp_path / "copy", 1)
    loaded = ["--load", str(tmp_path / "copy"), "--no-load-rng", "--pipeline-model-parallel-size", "2"]
    staged = run("staged", own, *asked, *loaded, world_size=2)
    names = ["lm loss", *(f"lm loss depth {depth}" for depth in depths)]
    for ours, theirs in zip(staged, found[1:], strict=True):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-6)
    events = scalars_of(tmp_path / "events")
    assert events[f"lm loss depth {others[-1]} validation"].keys() == {1, 2, 3}


@pytest.mark.grid
def test_supervision_steps_are_evaluated_in_a_row_whatever_the_other_depths(tmp_path: Path) -> None:
    steps = ["--num-refinement-blocks", "1", "--num-latent-refinements", "1", "--num-supervision-steps", "2"]
    for name, more in (("with", ["--eval-depths", "2,3"]), ("without", [])):
        metrics = ["--metrics-file", str(tmp_path / name / "metrics.jsonl")]
        assert train(*metrics, *EVALUATING, *more, recursion=steps) is None
    for ours, theirs in zip(evaluations(tmp_path / "with"), evaluations(tmp_path / "without"), strict=True):
        assert ours["lm loss depth 2"] == ours["lm loss"] == theirs["lm loss"] != ours["lm loss depth 3"]
