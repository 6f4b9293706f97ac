"""LoRA in training runs: from a base, resumed exactly, at other layouts, and refused where it cannot be."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_recursive.commands import parser_of
from megatron_recursive.commands.count import count
from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.hf.donors import save_donor
from tests.unit_tests.training.runs import (
    PLAIN,
    copy_checkpoint,
    losses_of,
    metrics_of,
    records_of,
    refusals,
    save_to,
    tensors_of,
    train,
)
from tests.unit_tests.training.test_checkpoints import NO_DROPOUT, assert_tensors_equal

LORA = ["--lora-rank", "2", "--lora-alpha", "8"]
FULL = ["--no-detach-between-refinements", "--swiglu"]
PER_PASS = [*LORA, "--lora-per-pass"]
KINDS = {"shared": LORA, "per pass": PER_PASS}
TP2_PP2 = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of all weights."""
    folder = tmp_path_factory.mktemp("base")
    assert train(*save_to(folder), *FULL, *NO_DROPOUT, "--train-iters", "2") is None
    return folder


def weights_of(folder: Path) -> dict[str, Any]:
    return {key: weight for key, weight in tensors_of(folder).items() if not key.startswith("optimizer")}


def start(base: Path, out: Path) -> list[str]:
    return ["--load", str(base), "--finetune", "--save", str(out), "--save-interval", "3", *FULL, *NO_DROPOUT]


@pytest.mark.parametrize("kind", grid(KINDS, quick=["per pass"]))
def test_a_frozen_base_trains_and_resumes_exactly(kind: str, base: Path, tmp_path: Path) -> None:
    flags, whole, resumed = KINDS[kind], tmp_path / "whole", tmp_path / "resumed"
    assert train(*start(base, whole), *flags) is None
    before, after, stored = weights_of(base / "iter_0000002"), weights_of(whole / "iter_0000006"), tensors_of(
        whole / "iter_0000006")  # fmt: skip
    (all_weights,), (frozen,) = (records_of(folder, "run") for folder in (base, whole))
    assert 0.5 < frozen["FLOPs per token"] / all_weights["FLOPs per token"] < 0.75, "no gradients of frozen weights"
    counted = count(parser_of("count").parse_args(["--model", str(whole)]))
    assert counted["flops_per_token"]["training"] == pytest.approx(frozen["FLOPs per token"])
    added = after.keys() - before.keys()
    assert added and all(".lora." in key for key in added)
    assert all(torch.equal(after[key], before[key]) for key in before)  # the base, bit by bit
    assert all(after[key].any() for key in added)
    states = {key for key in stored if key.startswith("optimizer.state.exp_avg.")}
    assert states == {f"optimizer.state.exp_avg.{key}" for key in added}  # no state for what is frozen
    copy_checkpoint(whole, resumed, 3)
    assert train(*save_to(resumed), *FULL, *NO_DROPOUT, *flags) is None
    assert metrics_of(resumed) == {number: metrics_of(whole)[number] for number in (4, 5, 6)}
    assert_tensors_equal(whole / "iter_0000006", resumed / "iter_0000006")


@pytest.mark.parametrize("kind", grid(KINDS, quick=[]))
def test_adapters_go_on_at_another_layout(kind: str, base: Path, tmp_path: Path) -> None:
    flags, whole, spread = KINDS[kind], tmp_path / "whole", tmp_path / "spread"
    assert train(*start(base, whole), *flags) is None
    copy_checkpoint(whole, spread, 3)
    assert train(*save_to(spread), *FULL, *NO_DROPOUT, *flags, *TP2_PP2, world_size=4) is None
    run = losses_of(whole)
    assert losses_of(spread) == pytest.approx({number: run[number] for number in (4, 5, 6)}, rel=1e-5)


def test_checkpoints_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    assert train(*start(base, tmp_path), *LORA, "--train-iters", "3") is None
    own = [*save_to(tmp_path), *FULL, *NO_DROPOUT]
    cases: list[tuple[list[str], str]] = [
        ([], "holds adapters of --lora-rank 2 --lora-alpha 8 --lora-targets linear_qkv linear_proj linear_fc1 "
             "linear_fc2 (this run: none); give its own, or export it merged"),
        (["--lora-rank", "4"], "(this run: --lora-rank 4 --lora-alpha 8 "),
        ([*LORA, "--lora-targets", "linear_qkv"], "(this run: --lora-rank 2 --lora-alpha 8 --lora-targets linear_qkv)"),
        (PER_PASS, "linear_fc2 --lora-per-pass); give its own"),
    ]  # fmt: skip
    *sentences, bare = refusals([*([*own, *flags] for flags, _ in cases), ["--load", base, *FULL, *LORA]])
    for (_, expected), said in zip(cases, sentences, strict=True):
        assert expected in said
    assert "holds no adapters (--lora-rank); start from its weights with --finetune, into another --save" in bare
    longer = ["--train-iters", "4", "--override-opt_param-scheduler"]
    assert train(*save_to(tmp_path), "--use-checkpoint-args", *longer) is None


def test_a_map_that_would_stay_blind_to_the_state_is_refused(tmp_path: Path) -> None:
    sampled = ["--recursion-family", "recurrent", "--injection", "concat", "--state-init", "sampled"]
    assert train(*save_to(tmp_path), "--train-iters", "1", recursion=PLAIN) is None
    said = train("--init-from-gpt", tmp_path, *LORA, recursion=sampled)
    assert said is not None and "reads no state yet, so that all recurrences would be one; train it first" in said
    (said,) = run_distributed(_says_of_an_older_map, 1)
    assert "reads no token; import the donor anew" in said
    assert train("--init-from-gpt", tmp_path, *LORA, "--train-iters", "1", recursion=sampled[:4]) is None


def _says_of_an_older_map() -> str:
    from argparse import Namespace

    from megatron_recursive.errors import UserError
    from megatron_recursive.training.lora import refuse_blind_adapter

    model = Namespace(adapter=Namespace(weight=torch.eye(4, 8)), config=Namespace(lora=LORA),
                      plan=Namespace(starts_at_input=False))  # fmt: skip
    with pytest.raises(UserError) as refused:
        refuse_blind_adapter([model], Path("import"))
    return str(refused.value)


def _says_of_equal_rows(first: int) -> str:
    from argparse import Namespace

    from megatron_recursive.training.start_check import tell_equal_rows

    heard, weight = io.StringIO(), torch.eye(8, 6)  # the last two rows are zero
    table = Namespace(weight=weight, vocab_start_index=first, vocab_end_index=first + 8)
    with contextlib.redirect_stdout(heard):
        tell_equal_rows(table, torch.arange(2, 18))
    return heard.getvalue()


def test_frozen_tokens_that_nothing_tells_apart_are_told() -> None:
    (said,) = run_distributed(_says_of_equal_rows, 1, 5)
    assert said.startswith("WARNING: the tokens 11, 12 have the same embedding, which --lora-rank freezes, so")
    assert run_distributed(_says_of_equal_rows, 1, 12) == [""]


def _import(donor: Path, out: Path) -> None:
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model

    import_model(str(donor), str(out), ImportOptions(recursion={"enable_recursive_refinement": False}), lambda _: None)


@pytest.mark.grid
def test_adapters_of_an_imported_donor_learn(tmp_path: Path) -> None:
    """A plain one, with biases on q, k and v, in bf16, under the full recompute and the distributed optimizer."""
    run_distributed(_import, 1, save_donor("qwen2", tmp_path / "donor"), tmp_path / "ckpt")
    flags = ("--lr 1e-2 --mock-data --tokenizer-type NullTokenizer --eval-iters 0 --num-workers 0 --train-iters 8 "
             "--save-interval 8 --seq-length 32 --log-interval 1 --micro-batch-size 2 --bf16 "
             "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
             "--use-distributed-optimizer").split()  # fmt: skip
    argv = [f"@{tmp_path / 'ckpt/megatron_args.txt'}", *flags, "--load", tmp_path / "ckpt", "--save", tmp_path / "run"]
    assert train(*argv, "--finetune", *LORA, flags=(), recursion=PLAIN) is None
    losses = losses_of(tmp_path / "run")
    assert losses[8] < losses[1] - 0.05
