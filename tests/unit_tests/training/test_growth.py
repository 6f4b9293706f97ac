"""--grow-depth-at: a model that is deeper from a part of its training on, at every layout and over a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.plots.runs import read_runs
from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.training.runs import (
    FLAGS,
    TIMES,
    copy_checkpoint,
    losses_of,
    metrics_of,
    records_of,
    save_to,
    tensors_of,
    train,
)

# Iterations 1 to 4 at the first depth, 5 to 8 at the other.
HOW = ["--num-layers", "4", "--train-iters", "8", "--hidden-dropout", "0", "--attention-dropout", "0",
       "--eval-iters", "1", "--eval-interval", "2"]  # fmt: skip
AT, LAST = 4, 8
FAMILIES = {  # other knobs, that of the depth, both depths
    "recurrent": (
        ["--recursion-family", "recurrent", "--num-prelude-layers", "1", "--num-coda-layers", "1",
         "--recurrence-step", "mean", "--injection", "add", "--backprop-depth", "2"], "--num-recurrences", 2, 4,
    ),
    "looped": (["--recursion-family", "looped", "--exit-gate"], "--num-refinement-blocks", 2, 3),
    "core": (["--num-latent-refinements", "1"], "--num-refinement-blocks", 1, 3),
}  # fmt: skip


def run(
    folder: Path, family: str, *flags: str, grows: bool = True, depth: int | None = None, **more: Any
) -> str | None:
    knobs, flag, first, then = FAMILIES[family]
    growth = ["--grow-depth-at", f"0.5:{then}"] if grows else []
    return train(*save_to(folder, 2), *HOW, *flags, *growth, recursion=[*knobs, flag, str(depth or first)], **more)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def of(family: str) -> Path:
        folder = tmp_path_factory.mktemp("grown")
        assert run(folder, family) is None
        return folder

    return of


def said(folder: Path, kind: str, after: int) -> list[dict[str, Any]]:
    left_out, records = (*TIMES, "recurrence", "FLOPs"), records_of(folder, kind)
    return [{n: v for n, v in r.items() if n not in left_out} for r in records if r["iteration"] > after]


@pytest.mark.parametrize("family", grid(FAMILIES, quick=[]))
def test_it_is_the_run_that_goes_on_at_the_other_depth(
    family: str, grown: Callable[[str], Path], tmp_path: Path
) -> None:
    _, _, first, then = FAMILIES[family]
    assert run(tmp_path, family, "--exit-interval", str(AT), grows=False) is None
    for kind in ("train", "valid"):
        assert said(tmp_path, kind, 0) == [r for r in said(grown(family), kind, 0) if r["iteration"] <= AT]
    assert run(tmp_path, family, "--override-recursion-depth", grows=False, depth=then) is None
    for kind in ("train", "valid"):
        assert said(tmp_path, kind, AT) == said(grown(family), kind, AT)
    depths = [record["recurrence"] for record in records_of(grown(family), "train")]
    assert depths == [first] * AT + [then] * (LAST - AT)


@pytest.mark.parametrize(("family", "start"), grid([(f, n) for f in FAMILIES for n in (2, 6)], [("recurrent", 2)]))
def test_two_stages_go_on_before_and_behind_the_growth(
    family: str, start: int, grown: Callable[[str], Path], tmp_path: Path
) -> None:
    copy_checkpoint(grown(family), tmp_path, start)
    stages = ["--pipeline-model-parallel-size", "2", "--no-load-rng"]
    assert run(tmp_path, family, *stages, world_size=2) is None
    expected, found = metrics_of(grown(family)), metrics_of(tmp_path)
    assert sorted(found) == list(range(start + 1, LAST + 1))
    for step, record in found.items():
        for name in ("lm loss", "grad norm", "FLOPs"):
            assert record[name] == pytest.approx(expected[step][name], rel=1e-5), (step, name)
    for ours, theirs in zip(said(tmp_path, "valid", start), said(grown(family), "valid", start), strict=True):
        assert ours["lm loss"] == pytest.approx(theirs["lm loss"], rel=1e-5)
    (read,) = read_runs([tmp_path])
    assert read.plan is not None and read.plan.depth == FAMILIES[family][3], "that of its last evaluation"


@pytest.mark.grid
def test_a_checkpoint_is_of_its_depth_and_resumes_exactly(grown: Callable[[str], Path], tmp_path: Path) -> None:
    """Behind the growth it is a model of the other depth and goes on with or without the flag."""
    from megatron_recursive.commands import main

    whole = grown("recurrent")
    for iteration, depth in ((AT, 2), (6, 4)):
        copy_checkpoint(whole, tmp_path / str(iteration), iteration)
        recorded = json.loads((tmp_path / str(iteration) / f"iter_{iteration:07d}" / "run.json").read_text())
        assert recorded["recursion"]["num_recurrences"] == depth and len(recorded["plan"]["passes"]) == depth + 2
        main(["count", "--model", str(tmp_path / str(iteration)), "--output", str(tmp_path / "count.json"), "--json"])
        counted = json.loads((tmp_path / "count.json").read_text())
        assert counted["model"]["passes"] == depth + 2
    assert run(tmp_path / "6", "recurrent") is None
    assert said(tmp_path / "6", "train", 6) == said(whole, "train", 6)
    copy_checkpoint(whole, tmp_path / "bare", 6)
    assert run(tmp_path / "bare", "recurrent", grows=False, depth=4) is None
    assert said(tmp_path / "bare", "train", 6) == said(whole, "train", 6)
    copy_checkpoint(whole, tmp_path / "longer", 6)
    refused = run(tmp_path / "longer", "recurrent", "--train-iters", "40", "--override-opt_param-scheduler")
    assert refused is not None and "--num-recurrences 4 (this run: 2)" in refused


@pytest.mark.grid
def test_the_learning_rate_may_rise_anew(tmp_path: Path) -> None:
    how = ["--lr-decay-style", "linear", "--grow-rewarm-iters", "3", "--eval-interval", "100"]
    assert run(tmp_path, "looped", *how, "--exit-interval", "6") is None
    assert run(tmp_path, "looped", *how) is None
    rates = {step: record["learning rate"] for step, record in metrics_of(tmp_path).items()}
    factors = {4: 1 / 3, 5: 2 / 3}  # Megatron's record of an iteration tells the rate of the next
    expected = {step: 1e-2 * (1 - (step - 1) / 8) * factors.get(step, 1.0) for step in range(1, LAST + 1)}
    assert rates == pytest.approx(expected)  # --lr-warmup-iters 1, --lr-decay-iters 9


def test_it_rises_behind_the_growth_where_the_schedule_has_begun_anew(tmp_path: Path) -> None:
    """Growth goes by iterations, of which --no-load-optim loses none, though Megatron's schedule then starts at 0."""
    how = ["--grow-rewarm-iters", "3"]
    assert run(tmp_path, "looped", *how, "--exit-interval", "2") is None
    assert run(tmp_path, "looped", *how, "--no-load-optim", "--lr-decay-style", "constant") is None
    rates = {step: record["learning rate"] for step, record in metrics_of(tmp_path).items() if step > 2}
    assert rates == pytest.approx({3: 1e-2, 4: 1e-2 / 3, 5: 2e-2 / 3, 6: 1e-2, 7: 1e-2, 8: 1e-2})


LLAMA = ["--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"]
CHAINS = {  # plans whose passes are a chain of layers
    "looped": ["--recursion-family", "looped", "--state-norm", "none", "--halt-loss-weight", "0",
               "--num-refinement-blocks", "2"],
    "recurrent": ["--recursion-family", "recurrent", "--num-recurrences", "3", "--num-prelude-layers", "1",
                  "--num-coda-layers", "1"],
}  # fmt: skip


def _untied(folder: str) -> None:
    """A run's checkpoint, unrolled and imported as a plain GPT."""
    from megatron_recursive.commands import main

    main(["convert", "unroll", f"{folder}/tied", f"{folder}/unrolled"])
    main(["convert", "import", "--hf", f"{folder}/unrolled", "--out", f"{folder}/untied",
          "--disable-recursive-refinement"])  # fmt: skip


@pytest.mark.parametrize("family", grid(CHAINS, quick=[]))
def test_unrolled_layers_train_on_each_by_itself(family: str, tmp_path: Path) -> None:
    """Untied growth: both begin with the loss of the loops, on the batch that the loops began with."""
    how = [*HOW, *LLAMA, "--eval-interval", "100", "--lr-decay-iters", "40", "--vocab-size", "128"]  # of no padding
    assert train(*save_to(tmp_path / "tied", 8), *how, recursion=CHAINS[family]) is None
    run_distributed(_untied, 1, str(tmp_path), timeout=240)
    begin = ["--lr-warmup-iters", "0", "--lr", "3e-3", "--save-interval", "8", "--save"]
    tied = ["--load", tmp_path / "tied", "--finetune"]
    assert train(*begin, tmp_path / "tied on", *how, *tied, recursion=CHAINS[family]) is None
    flags, untied = [f"@{tmp_path}/untied/megatron_args.txt", *FLAGS], ["--init-from-gpt", tmp_path / "untied"]
    how += ["--num-layers", "8"]
    said = train(*begin, tmp_path / "on", *how, *untied, recursion=["--disable-recursive-refinement"], flags=flags)
    assert said is None, said
    loops, layers = (losses_of(tmp_path / name) for name in ("tied on", "on"))
    assert layers[1] == pytest.approx(loops[1], rel=1e-5) and layers[8] < layers[1]
    weight = tensors_of(tmp_path / "on" / "iter_0000008")["decoder.layers.mlp.linear_fc2.weight"]
    assert len(weight) == 8 and (weight[1] - weight[5]).abs().max() > 1e-4
