"""``--data-stream``: what is trained on does not depend on interruptions, nor on how many ranks read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.data.preprocess import preprocess
from megatron_recursive.data.stream import TokenStream
from megatron_recursive.data.tokenizer import TokenizerChoice, store_tokenizer
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.training.checkpointing import saved_arguments
from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.data.test_stream import TEXTS, write
from tests.unit_tests.training.runs import FLAGS, RECURSION, copy_checkpoint, in_worker, losses_of, records_of, save_to

SEQ, BATCH = 16, 4
NO_TEXT = {"--mock-data": 1, "--tokenizer-type": 2, "--vocab-size": 2, "--split": 2}


def without(flags: Sequence[str], names: dict[str, int]) -> list[str]:
    kept = list(flags)
    for name, words in names.items():
        at = kept.index(name)
        del kept[at : at + words]
    return kept


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    train_tokenizer([folder / "texts.txt"], folder / "tok", 320)
    write(folder / "shards", TEXTS[:20], files=2, group=3)  # an epoch is less than the run
    write(folder / "others", TEXTS[20:40])
    preprocess([folder / "texts.txt"], folder / "valid", folder / "tok")
    return folder


def recorded(argv: list[str]) -> tuple[str | None, list[Any]]:
    """A run as :func:`in_worker`'s, with what this rank read: tokens and labels of each micro-batch of the training."""
    import torch

    from megatron_recursive.training import forward_step

    get_batch, read = forward_step.get_batch, list[Any]()

    def noted(iterator: Any) -> Any:
        batch = get_batch(iterator)
        if torch.is_grad_enabled():
            read.append([None if batch[name] is None else batch[name].tolist() for name in ("tokens", "labels")])
        return batch

    forward_step.get_batch = noted
    try:
        return in_worker(argv), read
    finally:
        forward_step.get_batch = get_batch


def run(corpus: Path, *words: str | Path, world_size: int = 1) -> tuple[str | None, list[list[Any]]]:
    """The sentence of a refusal, and what each rank read."""
    argv = [*without(FLAGS, NO_TEXT), *RECURSION, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
            str(corpus / "tok"), "--data-stream", str(corpus / "shards"), *map(str, words),
            "--hidden-dropout", "0", "--attention-dropout", "0"]  # fmt: skip
    results = run_distributed(recorded, world_size, argv, timeout=120)
    return results[0][0], [read for _, read in results]


def samples(read: list[Any], replicas: int = 1, which: int = 0) -> list[list[list[int]]]:
    """Of each iteration, the rows that this rank read."""
    rows = [row for batch in read for row in batch[which]]
    size = BATCH // replicas
    return [rows[at : at + size] for at in range(0, len(rows), size)]


@pytest.fixture(scope="module")
def calm(corpus: Path) -> list[list[list[int]]]:
    """The rows of six iterations in one go, with evaluations between."""
    said, (read,) = run(corpus, *save_to(corpus / "calm"), "--valid-data-path", corpus / "valid", "--eval-iters", "1",
                        "--eval-interval", "2")  # fmt: skip
    assert said is None
    return samples(read)


def test_rows_are_the_stream_in_order(corpus: Path, calm: list[list[list[int]]], tmp_path: Path) -> None:
    stored = store_tokenizer(TokenizerChoice(str(corpus / "tok")), tmp_path)
    stream = TokenStream(str(corpus / "shards"), stored, seed=1234)
    rows = [row for iteration in calm for row in iteration]
    assert rows == [stream.read(number * SEQ, SEQ).tolist() for number in range(6 * BATCH)]
    assert stream.mark(6 * BATCH * SEQ)[0] > 0
    assert len(records_of(corpus / "calm", "valid")) >= 2
    position = saved_arguments(corpus / "calm" / "iter_0000003")["data_stream_position"]
    assert (position["sample"], position["token"]) == (3 * BATCH - 1, (3 * BATCH - 1) * SEQ)


@pytest.mark.parametrize("after", grid([1, 2], quick=[2]))
def test_a_resumed_run_reads_on_with_any_number_of_replicas(
    after: int, corpus: Path, calm: list[list[list[int]]], tmp_path: Path
) -> None:
    layout = save_to(tmp_path)
    said, (first,) = run(corpus, *layout, "--eval-iters", "0", "--exit-interval", "3")
    assert said is None
    said, ranks = run(corpus, *layout, "--eval-iters", "0", world_size=after)
    assert said is None
    parts = [samples(read, after) for read in ranks]
    resumed = [[row for part in parts for row in part[number]] for number in range(3)]
    assert samples(first) == calm[:3]
    assert [sorted(rows) for rows in resumed] == [sorted(rows) for rows in calm[3:]]
    assert losses_of(tmp_path) == pytest.approx(losses_of(corpus / "calm"), rel=0 if after == 1 else 1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("layout", [["--tensor-model-parallel-size"], ["--pipeline-model-parallel-size"]])
def test_every_rank_that_reads_sees_the_same(layout: list[str], corpus: Path, calm: list[list[list[int]]]) -> None:
    said, (one, other) = run(corpus, *layout, "2", "--eval-iters", "0", world_size=2)
    assert said is None and samples(one) == calm
    labels = samples(other, which=1)
    assert [[row[:-1] for row in rows] for rows in labels] == [[row[1:] for row in rows] for rows in calm]


def test_a_batch_of_carried_steps_that_was_under_way_is_read_again(
    corpus: Path, calm: list[list[list[int]]], tmp_path: Path
) -> None:
    flags = [*save_to(tmp_path, 4), "--num-supervision-steps", "4", "--eval-iters", "0"]
    said, (read,) = run(corpus, *flags, "--train-iters", "6")
    assert said is None and samples(read) == [calm[0]] * 4 + [calm[1]] * 2
    said, (read,) = run(corpus, *flags, "--train-iters", "9", "--override-opt_param-scheduler")
    assert said is None and samples(read) == [calm[1]] * 2 + [calm[2]]


@pytest.mark.parametrize("iteration", [1, 2])
def test_an_overridden_iteration_reads_on_behind_it(
    iteration: int, corpus: Path, calm: list[list[list[int]]], tmp_path: Path
) -> None:
    copy_checkpoint(corpus / "calm", tmp_path, 3)
    flags = ["--override-ckpt-iteration", iteration, "--train-iters", "4", "--override-opt_param-scheduler"]
    said, (read,) = run(corpus, "--load", tmp_path, *flags, "--eval-iters", "0")
    assert said is None and samples(read) == calm[iteration:4]


def test_other_data_are_read_from_their_beginning(corpus: Path, calm: list[list[list[int]]], tmp_path: Path) -> None:
    said, (read,) = run(corpus, "--data-stream", corpus / "others", "--load", corpus / "calm", "--train-iters", "7",
                        "--eval-iters", "0", "--override-opt_param-scheduler")  # fmt: skip
    stored = store_tokenizer(TokenizerChoice(str(corpus / "tok")), tmp_path)
    stream = TokenStream(str(corpus / "others"), stored, seed=1234)
    assert said is None and samples(read) == [[stream.read(number * SEQ, SEQ).tolist() for number in range(BATCH)]]


def test_what_a_stream_cannot_go_with_is_refused(corpus: Path) -> None:
    cases = {
        ("--mock-data",): "--data-stream excludes --mock-data; leave out either.",
        ("--train-data-path", str(corpus / "valid")): "--data-stream excludes --train-data-path",
        ("--eval-iters", "1"): "--data-stream holds no data apart for evaluation; give --valid-data-path",
        ("--tokenizer-type", "NullTokenizer", "--vocab-size", "320"): "cannot tokenize with --tokenizer-type Null",
        ("--data-stream-key", "body"): "has no column 'body'",
    }
    for words, expected in cases.items():
        said, _ = run(corpus, *words)
        assert said is not None and expected in said, json.dumps(said)
