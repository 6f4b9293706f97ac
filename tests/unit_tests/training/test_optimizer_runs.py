"""Optimizers, learning rates by part and averaged weights through real (tiny) training runs and their checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.training.runs import (
    FEW,
    FLAGS,
    RECURSION,
    copy_checkpoint,
    losses_of,
    metrics_of,
    records_of,
    save_to,
    tensors_of,
    train,
)
from tests.unit_tests.training.test_run_output import shown_in_worker

STILL = ["--hidden-dropout", "0", "--attention-dropout", "0"]
LAYOUTS = {"one": [], "TP 2": ["--tensor-model-parallel-size", "2"], "PP 2": ["--pipeline-model-parallel-size", "2"]}
OPTIMIZERS = {
    "muon": ["--optimizer", "muon", "--muon-fp32-matmul-prec", "high"],
    "adam_atan2": ["--optimizer", "adam_atan2", "--adam-beta2", "0.95"],
    "ellis_adam": ["--optimizer", "ellis_adam", "--adam-beta2", "0.95", "--weight-decay", "1e-4",
                   "--core-lr-factor", "0.5"],
    "sgd": ["--optimizer", "sgd", "--lr", "0.3"],
}  # fmt: skip
QUICK = [("muon", "TP 2"), ("sgd", "one")]
_SAVED: dict[str, Path] = {}


def whole(optimizer: str, factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted iterations in one process, saved after three."""
    if optimizer not in _SAVED:
        _SAVED[optimizer] = factory.mktemp("whole")
        assert train(*save_to(_SAVED[optimizer]), *STILL, *OPTIMIZERS[optimizer]) is None
    return _SAVED[optimizer]


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    grid(itertools.product(OPTIMIZERS, LAYOUTS), quick=QUICK),
)
def test_an_optimizer_goes_on_at_any_layout(
    optimizer: str, layout: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = whole(optimizer, tmp_path_factory)
    copy_checkpoint(source, tmp_path, 3)
    flags = [*STILL, *OPTIMIZERS[optimizer], *LAYOUTS[layout]]
    assert train(*save_to(tmp_path, 6), *flags, world_size=1 if layout == "one" else 2) is None
    expected = {i: losses_of(source)[i] for i in (4, 5, 6)}
    assert losses_of(tmp_path) == pytest.approx(expected, rel=0 if layout == "one" else 1e-5)
    assert expected[6] < losses_of(source)[1] - 0.1


def test_another_optimizer_or_other_factors_do_not_go_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in ("muon", "ellis_adam"):
        copy_checkpoint(whole(name, tmp_path_factory), tmp_path / name, 3)
    load = ["--load", str(tmp_path / "muon"), *STILL]
    said = str(train(*load))
    assert "of another optimizer, with --optimizer muon (this run: adam)" in said and "--no-load-optim" in said
    ellis = ["--load", str(tmp_path / "ellis_adam"), *STILL, *OPTIMIZERS["ellis_adam"]]
    said = str(train(*ellis, "--core-lr-factor", "1"))
    assert "--throttle) layers x 0.5 (this run: none); give it as it was" in said
    assert train(*load, "--no-load-optim", "--exit-interval", "4") is None
    said = str(train("--optimizer", "sgd", "--use-distributed-optimizer"))
    assert said.startswith("--optimizer sgd does not go with --use-distributed-optimizer; leave that out")
    assert train(*ellis, "--lr", "5e-3", "--override-opt_param-scheduler", "--exit-interval", "4") is None


def averaged(folder: Path, iteration: int) -> dict[str, Any]:
    prefix = "optimizer.state.ema."
    tensors = tensors_of(folder / f"iter_{iteration:07d}")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


# Adam would make full steps out of rounding errors where a gradient is zero in theory (a key's bias).
EMA = ["--adam-eps", "1e-4", "--ema-decay", "0.5", "--eval-iters", "1", "--eval-interval", "3"]
SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@pytest.fixture(scope="module")
def average(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations on two replicas, every one saved, with an evaluation of the average."""
    folder = tmp_path_factory.mktemp("average")
    assert train(*save_to(folder, 1), *STILL, *EMA, *SHARDED, "--evaluate-ema", world_size=2) is None
    return folder


@pytest.mark.grid
def test_checkpoints_hold_the_average_and_any_layout_goes_on_with_it(average: Path, tmp_path: Path) -> None:
    import torch

    for iteration in (2, 6):
        before, now = averaged(average, iteration - 1), averaged(average, iteration)
        weights = tensors_of(average / f"iter_{iteration:07d}")
        assert {key for key in weights if not key.startswith("optimizer")} == now.keys()
        for key in now:
            torch.testing.assert_close(now[key], 0.5 * before[key] + 0.5 * weights[key])
    copy_checkpoint(average, tmp_path, 3)
    assert train(*save_to(tmp_path, 6), *STILL, *EMA, *LAYOUTS["TP 2"], "--use-distributed-optimizer", "--evaluate-ema",
                 world_size=2) is None  # fmt: skip
    whole, resumed = averaged(average, 6), averaged(tmp_path, 6)
    for key in whole:
        torch.testing.assert_close(resumed[key], whole[key], rtol=1e-4, atol=1e-5)
    (expected,), (mine,) = ([r for r in records_of(f, "valid") if r["iteration"] == 6] for f in (average, tmp_path))
    assert mine["lm loss"] == pytest.approx(expected["lm loss"], rel=1e-5)


@pytest.mark.grid
def test_evaluating_the_average_does_not_change_the_training(average: Path, tmp_path: Path) -> None:
    """And a run without one reads the checkpoint; with one again it starts at the weights."""
    import torch

    assert train(*save_to(tmp_path, 6), *STILL, *SHARDED, *EMA, world_size=2) is None
    assert losses_of(tmp_path) == losses_of(average)
    mine, other = (records_of(folder, "valid")[0]["lm loss"] for folder in (tmp_path, average))
    assert mine != other
    copy_checkpoint(average, tmp_path / "none", 5)
    eps = EMA[:2]
    flags = [*FLAGS, *RECURSION, *save_to(tmp_path / "none", 6), *STILL, *SHARDED, *eps]
    (said, _), _ = run_distributed(shown_in_worker, 2, flags, mock_documents=FEW, timeout=120)
    assert "averages its weights (--ema-decay 0.5), which this run drops" in said
    assert metrics_of(tmp_path / "none")[6] == metrics_of(average)[6] and averaged(tmp_path / "none", 6) == {}
    more = [*EMA, "--train-iters", "7", "--override-opt_param-scheduler"]
    assert train(*save_to(tmp_path / "none", 7), *STILL, *SHARDED, *more, world_size=2) is None
    before, after = (tensors_of(tmp_path / "none" / f"iter_{i:07d}") for i in (6, 7))
    for key, value in averaged(tmp_path / "none", 7).items():
        torch.testing.assert_close(value, (before[key] + after[key]) / 2)


def export_average(ckpt: str, out: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    from megatron_recursive.backends import cpu
    from megatron_recursive.hf.convert.export import export_model

    cpu.install(on_purpose=True)
    export_model(ckpt, out, averaged=True)
    return load_file(Path(out) / "model.safetensors")


def test_an_export_has_the_average(average: Path, tmp_path: Path) -> None:
    (weights,) = run_distributed(export_average, 1, str(average), str(tmp_path / "model"))
    mine = averaged(average, 6)
    assert (weights["model.embed_tokens.weight"] == mine["embedding.word_embeddings.weight"][:127]).all()
    assert (weights["halting_head.bias"] == mine["halting_head.bias"]).all()


@pytest.mark.grid
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_heads_alone_go_on_where_a_stage_trains_nothing(optimizer: str, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(*save_to(tmp_path / "gpt"), *STILL, recursion=["--disable-recursive-refinement"]) is None
    chosen = OPTIMIZERS[optimizer] + ["--core-lr-factor", "1"]  # the core is frozen
    flags = [*STILL, *chosen, "--ema-decay", "0.5", "--train-only", "heads", *LAYOUTS["PP 2"],
             "--init-from-gpt", str(tmp_path / "gpt")]  # fmt: skip
    assert train(*save_to(whole), *flags, world_size=2) is None
    copy_checkpoint(whole, resumed, 3)
    assert train(*save_to(resumed), *flags, world_size=2) is None
    assert [metrics_of(resumed)[i] for i in (4, 5, 6)] == [metrics_of(whole)[i] for i in (4, 5, 6)]
    assert averaged(resumed, 6).keys() == {"halting_head.weight", "halting_head.bias"}
