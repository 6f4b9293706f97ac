"""Checkpoints through real (tiny) training runs: resume, reshard, start from a plain GPT, refuse what does not fit."""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.plots.runs import read_runs
from megatron_recursive.training.checkpointing import changed_data, common_state
from megatron_recursive.training.optimizer_state import kept_settings
from megatron_recursive.training.progress import tokens_read
from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.training.runs import (
    FLAGS,
    PLAIN,
    RECURSION,
    copy_checkpoint,
    entries_of,
    files_of,
    in_worker,
    losses_of,
    metrics_of,
    records_of,
    refusals,
    save_to,
    stock_gpt_in_worker,
    tensors_of,
    train,
)

NO_DROPOUT = ["--hidden-dropout", "0", "--attention-dropout", "0"]
FROZEN = ["--lr", "0", "--min-lr", "0", "--override-opt_param-scheduler"]
LONGER = ["--train-iters", "9", "--override-opt_param-scheduler"]


@pytest.fixture(scope="module")
def recursive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted iterations (with dropout), saved after 3 and 6."""
    folder = tmp_path_factory.mktemp("recursive")
    assert train(*save_to(folder)) is None
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of this package's model with recursion off."""
    folder = tmp_path_factory.mktemp("plain")
    assert train(*save_to(folder), "--train-iters", "2", recursion=PLAIN) is None
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of Megatron's GPTModel, built by Megatron's builder from arguments that know no recursion."""
    folder = tmp_path_factory.mktemp("stock")
    run_distributed(stock_gpt_in_worker, 1, [*FLAGS, "--train-iters", "2", *save_to(folder)], timeout=120)
    return folder


def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(recursive: Path, tmp_path: Path) -> None:
    copy_checkpoint(recursive, tmp_path, 3)
    assert train(*save_to(tmp_path)) is None
    whole, resumed = metrics_of(recursive), metrics_of(tmp_path)
    assert sorted(resumed) == [4, 5, 6]
    (start,) = records_of(tmp_path, "run")
    assert (start["iteration"], start["passes"]) == (3, 4) and start["time"] > 1.7e9
    assert [resumed[i] for i in (4, 5, 6)] == [whole[i] for i in (4, 5, 6)]
    assert_tensors_equal(recursive / "iter_0000006", tmp_path / "iter_0000006")


def test_resharding_between_tensor_parallel_sizes(recursive: Path, tmp_path: Path) -> None:
    """The vocabulary of 127 stays padded to 128 although Megatron would pad it to 256 under TP 2."""
    one, two, back = tmp_path / "one", tmp_path / "two", tmp_path / "back"
    for folder in (one, two):
        copy_checkpoint(recursive, folder, 3)
    tp2 = ["--tensor-model-parallel-size", "2"]
    assert train(*save_to(two), *NO_DROPOUT, *tp2, world_size=2) is None
    assert train(*save_to(one, every=6), *NO_DROPOUT, *LONGER) is None
    copy_checkpoint(two, back, 6)
    assert train(*save_to(back), *NO_DROPOUT, *LONGER) is None
    reference = losses_of(one)
    assert losses_of(two) == pytest.approx({i: reference[i] for i in (4, 5, 6)}, rel=1e-5)
    assert losses_of(back) == pytest.approx({i: reference[i] for i in (7, 8, 9)}, rel=1e-5)


@pytest.mark.parametrize("precision", grid(["fp32", "bf16"], quick=[]))
def test_the_distributed_optimizer_resumes(precision: str, tmp_path: Path) -> None:
    """Exactly on as many ranks; on one rank up to the order of its sums."""
    flags = [*NO_DROPOUT, "--use-distributed-optimizer", *(["--bf16"] if precision == "bf16" else [])]
    whole, two, one = tmp_path / "whole", tmp_path / "two", tmp_path / "one"
    assert train(*save_to(whole), *flags, world_size=2) is None
    for folder in (two, one):
        copy_checkpoint(whole, folder, 3)
    assert train(*save_to(two), *flags, world_size=2) is None
    assert train(*save_to(one), *flags) is None
    expected = {i: metrics_of(whole)[i] for i in (4, 5, 6)}
    assert metrics_of(two) == expected
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    assert losses_of(one) == pytest.approx({i: expected[i]["lm loss"] for i in expected}, rel=tolerance)
    assert_tensors_equal(whole / "iter_0000006", two / "iter_0000006")


@pytest.mark.parametrize("origin", grid(["plain", "stock"], quick=["stock"]))
def test_init_from_gpt(origin: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The weights are the GPT's, everything else starts fresh; started again, the run resumes from its own."""
    gpt = request.getfixturevalue(origin)
    frozen = ["--init-from-gpt", gpt, *FROZEN, "--train-iters", "2"]
    assert train(*save_to(tmp_path, every=1), *frozen, "--train-iters", "1") is None
    (first,) = metrics_of(tmp_path).values()
    assert (first["iteration"], first["consumed samples"]) == (1, 4)
    weights, started = tensors_of(gpt / "iter_0000002"), tensors_of(tmp_path / "iter_0000001")
    own = {key for key in started if not key.startswith("optimizer")}
    assert own - weights.keys() == {"halting_head.weight", "halting_head.bias"}
    assert all((started[key] == weights[key]).all() for key in own & weights.keys())
    assert started["halting_head.bias"].tolist() == [-5.0]
    assert {key for key in weights if not key.startswith("optimizer")} <= own
    assert train(*save_to(tmp_path, every=1), *frozen) is None
    assert sorted(metrics_of(tmp_path)) == [1, 2]


@pytest.mark.grid
@pytest.mark.parametrize("knobs", [["--state-norm", "none"], ["--state-init", "trunc-normal"]], ids=" ".join)
def test_init_from_gpt_with_other_states(plain: Path, tmp_path: Path, knobs: list[str]) -> None:
    flags = ["--init-from-gpt", plain, *knobs, *FROZEN]
    assert train(*save_to(tmp_path, every=1), *flags, "--train-iters", "1") is None
    weights, started = tensors_of(plain / "iter_0000002"), tensors_of(tmp_path / "iter_0000001")
    kept = [key for key in weights if not key.startswith("optimizer")]
    assert all((started[key] == weights[key]).all() for key in kept)
    assert ("initial_output" in started) == ("trunc-normal" in knobs)
    assert train(*save_to(tmp_path, every=1), *flags, "--train-iters", "2") is None
    assert sorted(metrics_of(tmp_path)) == [1, 2]


def test_a_disabled_recursion_is_megatrons_own_gpt(plain: Path, stock: Path, tmp_path: Path) -> None:
    """The same keys on disk, and with the same layers Megatron goes on with the same weights, bit for bit."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert entries_of(plain / "iter_0000002") == entries_of(stock / "iter_0000002")
    copy_checkpoint(plain, ours, 2)
    copy_checkpoint(plain, theirs, 2)
    more = ["--train-iters", "4", "--override-opt_param-scheduler"]
    assert train(*save_to(ours, every=4), *more, recursion=PLAIN) is None
    run_distributed(stock_gpt_in_worker, 1, [*FLAGS, *save_to(theirs, every=4), *more], our_layers=True, timeout=120)
    assert_tensors_equal(ours / "iter_0000004", theirs / "iter_0000004")


@pytest.mark.grid
def test_megatrons_own_checkpoint_is_continued_with_recursion_off(plain: Path, stock: Path, tmp_path: Path) -> None:
    copy_checkpoint(stock, tmp_path / "stock", 2)
    copy_checkpoint(plain, tmp_path / "plain", 2)
    more = ["--train-iters", "4", "--override-opt_param-scheduler"]
    for name in ("stock", "plain"):
        assert train(*save_to(tmp_path / name, every=4), *more, recursion=PLAIN) is None
    assert losses_of(tmp_path / "stock") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)


def children_of_a_run(argv: list[str]) -> tuple[str | None, int]:
    import multiprocessing

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = None  # as after its import
    return in_worker(argv), len(multiprocessing.active_children())


def test_a_save_starts_no_process(tmp_path: Path) -> None:
    """Megatron's first one would spawn a process, which imports everything anew: six seconds and half a gigabyte."""
    argv = [*FLAGS, *RECURSION, *save_to(tmp_path), "--train-iters", "3"]
    assert run_distributed(children_of_a_run, 1, argv, timeout=120) == [(None, 0)]


OTHER_RECURSIONS = [
    (["--num-refinement-blocks", "3"], ["--num-refinement-blocks 2 (this run: 3)", "--override-recursion-depth"]),
    (["--num-latent-refinements", "2"], ["--num-latent-refinements 1 (this run: 2)", "--override-recursion-depth"]),
    (["--state-init", "trunc-normal"], ["--state-init zeros (this run: trunc-normal)"]),
    (["--state-norm", "none", "--override-recursion-depth"], ["--state-norm final (this run: none)"]),
    (["--embedding-multiplier", "3"], ["--embedding-multiplier 5.65", "(this run: 3.0)"]),
    (["--use-checkpoint-args", "--num-refinement-blocks", "3"], ["--num-refinement-blocks 2 (this run: 3)"]),
    (PLAIN, ["--enable-recursive-refinement on (this run: off)"]),
    (["--num-refinement-blocks", "3", "--state-norm", "none"], ["--num-refinement-blocks 2", "--state-norm final"]),
    (["--padded-vocab-size", "256"], ["--padded-vocab-size 256 is not the 128 of the checkpoint"]),
    (["--init-from-gpt", "SELF"], ["--init-from-gpt", "of a recursive model; continue it with --load"]),
]


def test_a_checkpoint_of_another_recursion_is_refused_by_flag(recursive: Path, plain: Path, stock: Path) -> None:
    before = files_of(recursive)
    own = [[*(["--load", recursive] if "SELF" not in flags else []),
            *(recursive if flag == "SELF" else flag for flag in flags)] for flags, _ in OTHER_RECURSIONS]  # fmt: skip
    *sentences, of_plain, of_stock = refusals([*own, ["--load", plain], ["--load", stock]])
    for (flags, expected), said in zip(OTHER_RECURSIONS, sentences, strict=True):
        assert all(part in said for part in expected), (flags, said)
        assert said.endswith(".") and "\n" not in said
    assert files_of(recursive) == before
    assert "--enable-recursive-refinement off (this run: on)" in of_plain
    assert "start from it with --init-from-gpt" in of_stock


def test_what_binds_nothing_is_a_note_and_depth_can_be_overridden(recursive: Path, tmp_path: Path) -> None:
    free = ["--halt-loss-weight", "0.5", "--halt-threshold", "0.7", "--detach-between-refinements"]
    assert train("--load", recursive, *free, *LONGER) is None
    copy_checkpoint(recursive, tmp_path, 6)
    shutil.copy(recursive / "metrics.jsonl", tmp_path)
    deeper = ["--num-refinement-blocks", "3", "--override-recursion-depth", "--seq-length", "8"]
    assert train(*save_to(tmp_path, every=1), *deeper, *LONGER, "--exit-interval", "8") is None
    assert "lm loss block 3" in metrics_of(tmp_path)[7]
    assert train(*save_to(tmp_path), *deeper, *LONGER) is None
    told = [(r["iteration"], r["tokens"]) for r in records_of(tmp_path, "run")]
    assert told == [(0, 0), (6, 6 * 64), (8, 6 * 64 + 2 * 32)]
    assert {n: r["tokens"] for n, r in metrics_of(tmp_path).items() if n > 5} == {
        6: 6 * 64, 7: 6 * 64 + 32, 8: 6 * 64 + 2 * 32, 9: 6 * 64 + 3 * 32
    }  # fmt: skip
    (run,), common = read_runs([tmp_path]), common_state(tmp_path / "iter_0000009")
    spent = [r["flops"] for r in run.of("train")][-1]
    assert spent == pytest.approx(common["num_floating_point_operations_so_far"], rel=1e-9)
    common["args"].consumed_train_samples = 4  # as under --override-ckpt-iteration 1: of the mean length until 8
    assert tokens_read(common["args"]) == (6 * 64 + 2 * 32) // 8


OTHER_SCHEDULES = [
    (["--lr", "2e-2"], "--lr 0.01 (this run: 0.02)"),
    (["--min-lr", "1e-3", "--weight-decay", "0.2"],
     "--min-lr 0 (this run: 0.001), --weight-decay 0.01 (this run: 0.2)"),
    (["--train-iters", "9"], "--train-iters 6 (this run: 9)"),
    (["--lr-warmup-iters", "2", "--lr-decay-style", "cosine", "--lr-decay-iters", "8"],
     "--lr-warmup-iters 1 (this run: 2), --lr-decay-iters 9 (this run: 8), --lr-decay-style linear (this run: cosine)"),
]  # fmt: skip


def test_another_schedule_is_told_by_flag_and_what_settles_it(recursive: Path) -> None:
    before = files_of(recursive)
    sentences = refusals([[*save_to(recursive), *flags] for flags, _ in OTHER_SCHEDULES])
    for (_, expected), said in zip(OTHER_SCHEDULES, sentences, strict=True):
        assert f"was trained on another schedule, with {expected}; give its values" in said, said
        assert "this run's with --override-opt_param-scheduler" in said and "beside" not in said
        assert "the checkpoint's with --use-checkpoint-opt_param-scheduler" in said
    assert files_of(recursive) == before  # nor does the refused start leave a record


@pytest.mark.grid
def test_either_schedule_goes_on_where_a_flag_chooses_it(recursive: Path, tmp_path: Path) -> None:
    copy_checkpoint(recursive, tmp_path, 3)
    other = ["--lr", "2e-2", "--weight-decay", "0.2"]
    for name, distributed, flag, factor in (
        ("theirs", [], "--use-checkpoint-opt_param-scheduler", 1), ("mine", [], "--override-opt_param-scheduler", 2),
        ("sharded", ["--use-distributed-optimizer"], "--override-opt_param-scheduler", 2),
    ):  # fmt: skip
        place = tmp_path / name
        if distributed:
            assert train(*save_to(place), *distributed, "--train-iters", "3", "--exit-interval", "3") is None
        else:
            copy_checkpoint(recursive, place, 3)
        assert train(*save_to(place), *distributed, *other, flag) is None
        rates = {i: factor * metrics_of(recursive)[i]["learning rate"] for i in (4, 5, 6)}
        assert {i: metrics_of(place)[i]["learning rate"] for i in (4, 5, 6)} == pytest.approx(rates)
    assert losses_of(tmp_path / "theirs") == {i: losses_of(recursive)[i] for i in (4, 5, 6)}


@pytest.mark.grid
def test_the_rate_of_embeddings_goes_on_or_is_changed_by_its_flag(tmp_path: Path) -> None:
    """--decoupled-lr is no part of Megatron's scheduler, and its parameter groups go by it."""
    source, flags = tmp_path / "source", ["--decoupled-lr", "5e-3", "--decoupled-min-lr", "1e-3"]
    assert train(*save_to(source), *flags) is None
    rates, other = {}, ["--decoupled-lr", "2e-3", "--decoupled-min-lr", "2e-3"]
    for name, words in (("same", flags), ("mine", [*other, "--override-opt_param-scheduler"]),
                        ("theirs", [*other, "--use-checkpoint-opt_param-scheduler"])):  # fmt: skip
        copy_checkpoint(source, tmp_path / name, 3)
        assert train(*save_to(tmp_path / name, every=6), *words) is None
        common = common_state(tmp_path / name / "iter_0000006")
        rates[name] = {(group["max_lr"], group["min_lr"]) for group in common["optimizer"]["param_groups"]}
    expected = {i: losses_of(source)[i] for i in (4, 5, 6)}
    assert losses_of(tmp_path / "same") == losses_of(tmp_path / "theirs") == expected
    assert rates == {"same": {(1e-2, 0.0), (5e-3, 1e-3)}, "theirs": {(1e-2, 0.0), (5e-3, 1e-3)},
                     "mine": {(1e-2, 0.0), (2e-3, 2e-3)}}  # fmt: skip
    said = str(train("--load", source, *other))
    assert "another schedule, with --decoupled-lr 0.005 (this run: 0.002), --decoupled-min-lr 0.001 (this run:" in said
    assert "with --decoupled-lr on (this run: off)" in str(train("--load", source))


def test_an_optimizer_of_another_precision_or_none_is_told(recursive: Path, tmp_path: Path) -> None:
    assert train(*save_to(tmp_path), "--no-save-optim", "--train-iters", "3") is None
    none, other = refusals([["--load", tmp_path], ["--load", recursive, "--bf16"]])
    assert "holds no optimizer's state (--no-save-optim); start its moments" in none and "--no-load-optim" in none
    assert "of another optimizer, with --bf16 off (this run: on); give it as it was" in other


def test_what_megatron_takes_from_the_checkpoint_is_told(recursive: Path) -> None:
    common = common_state(recursive / "iter_0000003")
    run = argparse.Namespace(**{**vars(common["args"]), "adam_beta2": 0.95, "no_load_optim": None})
    told = ["--adam-beta2 stays at the checkpoint's 0.999 (this run: 0.95), which only --no-load-optim changes"]
    assert kept_settings(common, run) == told
    assert changed_data(vars(common["args"]), run) == []
    run.seed, run.split = 0, "80, 10,10"
    said = changed_data(vars(common["args"]), run)
    assert [each.partition(", which")[0] for each in said] == [
        "the checkpoint was trained with --seed 1234 (this run: 0)",
        "the checkpoint was trained with --split 90,5,5 (this run: 80,10,10)",
    ]
    run.finetune = True
    assert changed_data(vars(common["args"]), run) == []


def with_states_of_a_gpu(argv: list[str]) -> str | None:
    import torch
    from megatron.training import checkpointing

    collect, of_cpu = checkpointing.get_rng_state, torch.cuda.get_rng_state

    def as_on_a_gpu(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
        try:
            return collect(*args, **kwargs)
        finally:
            torch.cuda.get_rng_state = of_cpu

    checkpointing.get_rng_state = as_on_a_gpu
    try:
        return in_worker(argv)
    finally:
        checkpointing.get_rng_state = collect


def test_random_states_of_another_device_are_told_from_damage(tmp_path: Path) -> None:
    argv = [*map(str, save_to(tmp_path)), "--exit-interval", "3"]
    assert run_distributed(with_states_of_a_gpu, 1, [*FLAGS, *RECURSION, *argv]) == [None]
    said = str(train(*save_to(tmp_path)))
    assert "holds the random states of another kind of device, CPU or GPU; add --no-load-rng to go on" in said
    assert train(*save_to(tmp_path), "--no-load-rng") is None


def moved(argv: list[str]) -> tuple[str | None, int]:
    """The sentence of a refusal, and how many models were put on the device of the run."""
    from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel

    seen = []
    RecursiveGPTModel.cuda = lambda self, device: seen.append(self) or self  # type: ignore[method-assign]
    try:
        return in_worker(argv), len(seen)
    finally:
        del RecursiveGPTModel.cuda


def test_weights_that_were_made_on_the_cpu_go_to_the_device() -> None:
    argv = [*FLAGS, *RECURSION, "--train-iters", "1", "--use-cpu-initialization"]
    assert run_distributed(moved, 1, argv) == [(None, 1)]


def test_moments_are_kept_under_another_rate(recursive: Path, tmp_path: Path) -> None:
    """The next step's moments know nothing of its rate."""
    rates = ["--lr", "2e-2", "--min-lr", "1e-3", "--override-opt_param-scheduler"]
    for name, flags in (("same", []), ("other", rates)):
        copy_checkpoint(recursive, tmp_path / name, 3)
        assert train(*save_to(tmp_path / name, every=4), "--exit-interval", "4", *flags) is None
    same, other = (tensors_of(tmp_path / name / "iter_0000004") for name in ("same", "other"))
    moments = {key for key in same if key.startswith(("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."))}
    assert len(moments) > 20 and all(_same(same[key], other[key]) for key in moments)
    assert not _same(same["decoder.final_layernorm.weight"], other["decoder.final_layernorm.weight"])


def damage(folder: Path, how: str) -> None:
    shards = sorted((folder / "iter_0000003").glob("*.distcp"))
    if how == "truncated shard":
        shards[0].write_bytes(shards[0].read_bytes()[: shards[0].stat().st_size // 2])
    elif how == "flipped bit":
        raw = bytearray(shards[0].read_bytes())
        headers = [match.start() for match in re.finditer(rb"PK[\x01-\x08]", raw)]  # each tensor is an archive
        start, end = max(itertools.pairwise(headers), key=lambda pair: pair[1] - pair[0])
        raw[(start + end) // 2] ^= 1  # amid the largest tensor
        shards[0].write_bytes(raw)
    elif how == "missing shard":
        shards[0].unlink()
    elif how == "missing index":
        (folder / "iter_0000003" / ".metadata").unlink()
    elif how == "missing folder":
        shutil.rmtree(folder / "iter_0000003")
    else:
        (folder / "latest_checkpointed_iteration.txt").write_bytes(how.encode("latin-1"))


@pytest.mark.parametrize(
    "how", ["truncated shard", "flipped bit", "missing shard", "missing index", "missing folder", "gar\xffbage", ""]
)
def test_a_damaged_checkpoint_is_a_sentence_and_stays_as_it_is(recursive: Path, tmp_path: Path, how: str) -> None:
    copy_checkpoint(recursive, tmp_path, 3)
    damage(tmp_path, how)
    before = files_of(tmp_path)
    said = train(*save_to(tmp_path))
    assert said is not None and said.endswith(".") and "\n" not in said
    assert str(tmp_path) in said
    assert files_of(tmp_path) == before


@pytest.mark.grid
def test_a_flipped_bit_is_found_on_any_layout(recursive: Path, tmp_path: Path) -> None:
    """By Megatron's manifest, which a save over an older one renews; without it a checkpoint loads unchecked."""
    copy_checkpoint(recursive, tmp_path, 3)
    copy_checkpoint(recursive, tmp_path, 6)
    assert train(*save_to(tmp_path), "--ckpt-step", "3", "--no-verify-integrity") is None  # writes 6 anew
    assert not (tmp_path / "iter_0000006" / "integrity.json").exists()  # it would be of the old files
    assert train(*save_to(tmp_path), "--ckpt-step", "3") is None  # over run.json too
    assert train(*save_to(tmp_path, every=7), *LONGER, "--exit-interval", "7", "--verify-integrity") is None
    shutil.rmtree(tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    damage(tmp_path, "flipped bit")
    layout = ["--tensor-model-parallel-size", "2"]
    for said in run_distributed(in_worker, 2, [*FLAGS, *RECURSION, *layout, *save_to(tmp_path)], timeout=120):
        assert "iter_0000003/__0_0.distcp is damaged or missing" in str(said)
        assert "the last good one beside it is 6:" in str(said)
    unchecked = [*save_to(tmp_path), "--exit-interval", "4", "--override-opt_param-scheduler"]
    assert train(*unchecked, "--no-verify-integrity") is None
    shutil.rmtree(tmp_path / "iter_0000004")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "iter_0000003" / "integrity.json").unlink()
    assert "--verify-integrity: " in str(train(*unchecked, "--verify-integrity"))
    assert train(*unchecked) is None


def _read_damaged(folder: Path) -> tuple[str, str]:
    """What the reader says, and what is logged beside it."""
    import io
    import logging

    from megatron_recursive.errors import UserError
    from megatron_recursive.training.checkpointing import common_state

    logged = io.StringIO()
    logging.getLogger().addHandler(handler := logging.StreamHandler(logged))
    try:
        common_state(folder)
    except UserError as error:
        return str(error), logged.getvalue()
    finally:
        logging.getLogger().removeHandler(handler)
    return "", ""


def test_a_damaged_index_is_told_without_a_stack(recursive: Path, tmp_path: Path) -> None:
    copy_checkpoint(recursive, tmp_path, 3)
    index = tmp_path / "iter_0000003" / ".metadata"
    index.write_bytes(index.read_bytes()[:400])
    (tmp_path / "iter_0000003" / "integrity.json").unlink()
    ((said, logged),) = run_distributed(_read_damaged, 1, tmp_path / "iter_0000003")
    assert "cannot be read" in said and "Traceback" not in logged


def assert_tensors_equal(folder: Path, other: Path) -> None:
    mine, theirs = tensors_of(folder), tensors_of(other)
    assert mine.keys() == theirs.keys()
    # In the buckets of the distributed optimizer, what memory held lies between the parameters.
    assert {key for key in mine if ".bucket_idx_" not in key and not _same(mine[key], theirs[key])} == set()


def _same(mine: Any, theirs: Any) -> bool:
    return mine.shape == theirs.shape and bool((mine == theirs).all())
