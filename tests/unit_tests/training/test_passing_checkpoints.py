"""Non-persistent checkpoints: what is compared, read and recorded is one folder, and any run goes on from it.

And no run is written over by one that does not go on from it.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.training.runs import files_of, losses_of, metrics_of, refusals, train

PASSING = ["--non-persistent-ckpt-type", "global", "--non-persistent-save-interval", "2"]
DISTRIBUTED = ["--use-distributed-optimizer"]


def save_to(folder: Path, *more: str) -> list[str]:
    return ["--save", str(folder), "--load", str(folder), "--save-interval", "3", *PASSING, *more]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five iterations; 3 is kept, and passing ones are of 2 and 4."""
    folder = tmp_path_factory.mktemp("passing")
    assert train(*save_to(folder), *DISTRIBUTED, "--train-iters", "5", "--exit-interval", "5") is None
    assert (folder / "non_persistent" / "iter_0000004" / "run.json").is_file()
    shutil.rmtree(folder / "iter_0000005")  # as if killed before
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


@pytest.mark.grid
def test_another_recursion_in_the_newer_passing_checkpoint_is_refused(saved: Path) -> None:
    before = files_of(saved)
    for flags, expected in (
        (["--num-latent-refinements", "2"], "--num-latent-refinements 1 (this run: 2)"),
        (["--state-norm", "none"], "--state-norm final (this run: none)"),
        (["--lr", "0.5"], "--lr 0.01 (this run: 0.5)"),
    ):
        said = train(*save_to(saved), *DISTRIBUTED, "--train-iters", "5", *flags)
        assert said is not None and expected in said and "non_persistent/iter_0000004" in said, said
    assert files_of(saved) == before


@pytest.mark.parametrize("step", grid([None, 3, 4, 2], quick=[None]), ids=str)
def test_the_folder_that_is_read_is_the_one_that_is_recorded(saved: Path, tmp_path: Path, step: int | None) -> None:
    """Exactly the uninterrupted losses, from the newest of both kinds or from the one asked for."""
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    asked = ["--ckpt-step", str(step)] if step else []
    assert train(*save_to(tmp_path / "run"), *DISTRIBUTED, "--train-iters", "5", *asked) is None
    first = (step or 4) + 1
    assert losses_of(tmp_path / "run") == {i: losses_of(saved)[i] for i in range(first, 6)}
    folder = "iter_0000003" if step == 3 else f"non_persistent/iter_{step or 4:07d}"
    record = json.loads((tmp_path / "run" / "iter_0000005" / "run.json").read_text())
    assert record["started from"] == str(tmp_path / "run" / folder)


@pytest.mark.grid
def test_a_damaged_passing_checkpoint_names_the_kept_one(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    shard = sorted((tmp_path / "run" / "non_persistent" / "iter_0000004").glob("*.distcp"))[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    flags = [*save_to(tmp_path / "run"), *DISTRIBUTED, "--train-iters", "5"]
    said = str(train(*flags))
    assert "is damaged" in said and "the last good one beside it is 3: give --ckpt-step 3 to a run" in said, said
    assert train(*flags, "--ckpt-step", "3") is None


@pytest.mark.grid
def test_a_start_from_a_plain_gpt_goes_on_from_its_passing_checkpoints(saved: Path, tmp_path: Path) -> None:
    """Which Megatron overlooked, since only kept ones count there; --ckpt-step is not for the GPT."""
    gpt, run = tmp_path / "gpt", tmp_path / "run"
    one = ["--train-iters", "1", "--save", str(gpt), "--save-interval", "1"]
    assert train(*one, recursion=["--disable-recursive-refinement"]) is None
    flags = [*save_to(run), "--init-from-gpt", gpt, "--train-iters", "3"]
    assert train(*flags, "--exit-interval", "2") is None
    assert not (run / "iter_0000002").exists()
    said = str(train(*save_to(tmp_path / "new"), "--init-from-gpt", gpt, "--ckpt-step", "1"))
    assert "--ckpt-step needs a checkpoint in --load" in said
    (run / "metrics.jsonl").unlink()
    assert train(*flags) is None
    assert sorted(metrics_of(run)) == [3]


def tracked(root: Path, iteration: str) -> Path:
    """What a start looks at before any work."""
    (root / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")).mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text(iteration)
    return root


def starts(cases: list[dict[str, str | bool | None]]) -> list[str | None]:
    """What is said of each start; a refusal's first half."""
    from megatron_recursive.errors import UserError
    from megatron_recursive.training.checkpoint_folders import checkpoint_to_read, refuse_overwriting

    flags = ("load", "save", "ckpt_step", "init_from_gpt", "skip_train", "finetune", "distill_prepare",
             "override_ckpt_iteration", "non_persistent_ckpt_type", "non_persistent_global_ckpt_dir")  # fmt: skip
    said: list[str | None] = []
    for case in cases:
        args = Namespace(**{**dict.fromkeys(flags), **case})
        folder, from_plain_gpt = checkpoint_to_read(args)
        try:
            said.append(refuse_overwriting(args, folder, from_plain_gpt=from_plain_gpt))
        except UserError as error:
            said.append(str(error).split(";")[0])
    return said


def test_a_run_is_not_written_over_by_one_that_does_not_go_on_from_it(tmp_path: Path) -> None:
    run, other, imported = tracked(tmp_path / "run", "20"), tracked(tmp_path / "other", "10"), tmp_path / "import"
    tracked(imported, "release")
    passing = {"non_persistent_ckpt_type": "global", "save": str(tracked(tmp_path / "new/non_persistent", "4").parent)}
    into = {"save": str(run)}
    good = [
        {"save": str(tmp_path / "none")}, {**into, "load": str(run)}, {**into, "load": str(run), "ckpt_step": 20},
        {**into, "load": f"{other}/../run", "ckpt_step": 20}, {**into, "skip_train": True}, {"load": str(run)},
        {"save": str(other), "load": str(run)}, {**into, "load": str(other), "override_ckpt_iteration": 20},
        {"save": str(imported), "load": str(imported), "finetune": True}, {"save": "s3://bucket/run"},
        {**passing, "load": passing["save"]}, {**into, "load": str(tracked(run / "best", "10"))},
    ]  # fmt: skip
    bad = [(into, 0), ({**into, "load": str(other)}, 10), ({**into, "load": str(imported)}, 0),
           ({**into, "load": str(tmp_path / "none")}, 0), ({**into, "load": str(run), "finetune": True}, 0),
           ({**into, "init_from_gpt": str(other)}, 0)]  # fmt: skip
    (said,) = run_distributed(starts, 1, [*good, *(case for case, _ in bad), passing])
    over = "holds iteration 20 of an earlier run, which this one would write over, since it starts at"
    assert said[: len(good)] == [None] * len(good)
    assert said[len(good) : -1] == [f"{run} {over} {start}" for _, start in bad]
    assert "new/non_persistent holds iteration 4 of" in said[-1]
    before = files_of(run)
    plain, finetuned = refusals([[*into_flags, "--save", run] for into_flags in ([], ["--load", run, "--finetune"])])
    mends = "to go on from there, or another --save, or remove that folder."
    assert plain.endswith(f"0; give --load {run} {mends}")
    assert finetuned.endswith(f"0; give --load {run} without --finetune {mends}")
    assert files_of(run) == before
