"""--train-only heads: from a trained model and from an imported donor, resumed, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.hf.donors import save_donor
from tests.unit_tests.training.runs import copy_checkpoint, metrics_of, refusals, save_to, tensors_of, train

BALANCED = ["--halt-bias", "0"]  # random weights are hardly ever right, of which the usual bias is too sure already
ONLY = ["--train-only", "heads"]
HEADS = {"halting_head.weight", "halting_head.bias"}
LAYOUTS = {
    "PP 2, distributed optimizer": (2, ["--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"]),
    "TP 2, PP 2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "DP 2, overlapped": (2, ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations of all weights."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(*save_to(folder), *BALANCED, "--train-iters", "3") is None
    return folder


def changed(before: Path, after: Path) -> set[str]:
    """The weights that differ."""
    theirs, mine = tensors_of(before), tensors_of(after)
    weights = {key for key in theirs if not key.startswith("optimizer")}
    assert weights == {key for key in mine if not key.startswith("optimizer")}
    return {key for key in weights if not (theirs[key] == mine[key]).all()}


@pytest.mark.parametrize("layout", grid(LAYOUTS, quick=[]))
def test_heads_train_on_from_a_trained_model_and_resume(layout: str, whole: Path, tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    heads, resumed = tmp_path / "heads", tmp_path / "resumed"
    start = ["--load", whole, "--finetune", "--save", heads, "--save-interval", "3"]
    flags = [*ONLY, *BALANCED, *flags]
    assert train(*start, *flags, world_size=ranks) is None
    assert changed(whole / "iter_0000003", heads / "iter_0000006") == HEADS
    run = metrics_of(heads)
    assert sorted(run) == [1, 2, 3, 4, 5, 6] and run[6]["halt loss"] < run[1]["halt loss"]
    assert all(step["total loss"] == pytest.approx(step["halt loss"]) and step["lm loss"] > 1 for step in run.values())
    copy_checkpoint(heads, resumed, 3)
    assert train(*save_to(resumed), *flags, world_size=ranks) is None
    assert metrics_of(resumed) == {number: run[number] for number in (4, 5, 6)}
    assert changed(heads / "iter_0000006", resumed / "iter_0000006") == set()


def test_what_has_no_heads_or_another_optimizer_is_refused(whole: Path, tmp_path: Path) -> None:
    knobs = (["--halt-loss-weight", "0"], ["--recursion-family", "recurrent"])
    for said in refusals([[*ONLY, *each] for each in knobs], recursion=()):
        assert "--train-only heads trains the heads that a recursion adds" in said
    deep, said = refusals([["--load", whole, *ONLY, "--enable-deep-supervision"],
                           [*save_to(whole), *ONLY, "--train-iters", "3"]])  # fmt: skip
    assert deep.startswith("--enable-deep-supervision says nothing under --train-only heads")
    assert "was trained with --train-only heads off (this run: on)" in said and "with --finetune, or" in said
    assert train("--load", whole, *ONLY, "--no-load-optim", "--save", tmp_path, "--save-interval", "9", "--train-iters",
                 "4", "--override-opt_param-scheduler") is None  # fmt: skip
    said = str(train(*save_to(tmp_path), "--train-iters", "4"))
    assert "was trained with --train-only heads on (this run: off)" in said


def _import(donor: Path, out: Path) -> None:
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model

    recursion = {"recursion_family": "looped", "num_refinement_blocks": 2, "halt_bias": 0.0}
    import_model(str(donor), str(out), ImportOptions(recursion=recursion), lambda _: None)


def test_the_head_of_an_imported_donor_learns(tmp_path: Path) -> None:
    run_distributed(_import, 1, save_donor("olmo2", tmp_path / "donor"), tmp_path / "ckpt")
    flags = ("--lr 1e-1 --mock-data --tokenizer-type NullTokenizer --eval-iters 0 --num-workers 0 --train-iters 4 "
             "--save-interval 4 --seq-length 32 --log-interval 1 --micro-batch-size 2").split()  # fmt: skip
    argv = [f"@{tmp_path / 'ckpt/megatron_args.txt'}", *flags, "--load", tmp_path / "ckpt", "--save", tmp_path / "run"]
    assert train(*argv, *ONLY, flags=(), recursion=()) is None
    assert changed(tmp_path / "ckpt" / "release", tmp_path / "run" / "iter_0000004") == HEADS
    losses = metrics_of(tmp_path / "run")
    assert losses[4]["halt loss"] < losses[1]["halt loss"]
