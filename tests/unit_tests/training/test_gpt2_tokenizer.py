"""--vocab-file and --merge-file: GPT-2's tokenizer without a network, for preprocessing and for training alike."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_recursive.data.preprocess import Options, preprocess
from megatron_recursive.data.tokenizer import TokenizerChoice
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.errors import UserError
from tests.unit_tests.training.runs import FLAGS, losses_of, save_to, train

TEXTS = [f"Text number {n}: it's {'again and ' * (n % 5)}naïve,  isn't it?\n\n漢字 {n * 37}" for n in range(60)]
WITHOUT_TOKENIZER = [*FLAGS[: FLAGS.index("--mock-data")], *FLAGS[FLAGS.index("--eval-iters") :]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt, a corpus, and its tokens."""
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer([folder / "corpus.jsonl"], folder, 400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    choice = TokenizerChoice(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))
    preprocess([folder / "corpus.jsonl"], folder / "tokens", choice)
    return folder


def files_of(folder: Path) -> list[str]:
    return ["--vocab-file", str(folder / "vocab.json"), "--merge-file", str(folder / "merges.txt")]


def arguments(folder: Path) -> Namespace:
    return Namespace(
        tokenizer_type="GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), special_tokens=None,
        merge_file=str(folder / "merges.txt"), tokenizer_hf_no_include_special_tokens=False,
    )  # fmt: skip


def test_ids_are_those_of_hugging_face_and_of_the_data(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import GPT2Tokenizer

    from megatron_recursive.training.patches import gpt2_tokenizer

    (folder / "hf").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / "hf" / name).write_bytes((folder / name).read_bytes())
    theirs, ours = GPT2Tokenizer.from_pretrained(folder / "hf"), gpt2_tokenizer.build(arguments(folder))
    assert ours.vocab_size == len(theirs) == 400
    assert ours.eod == theirs.convert_tokens_to_ids("<|endoftext|>") == theirs.eos_token_id == 0
    dataset = IndexedDataset(str(folder / "tokens"))
    for number, text in enumerate(TEXTS):
        ids = theirs.encode(text)
        assert ours.tokenize(text) == ids
        assert dataset[number].tolist() == [*ids, ours.eod]
        assert ours.detokenize(ids) == text
    assert len(ids) < len(text)


def test_the_index_files_of_the_data_do_not_depend_on_where_the_files_lie(folder: Path, tmp_path: Path) -> None:
    from megatron_recursive.training.patches import gpt2_tokenizer

    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    one, other = (gpt2_tokenizer.build(arguments(each)).unique_identifiers for each in (folder, tmp_path))
    assert one == other
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert gpt2_tokenizer.build(arguments(tmp_path)).unique_identifiers != one


@pytest.mark.grid
def test_a_run_trains_and_resumes_with_the_two_files(folder: Path, tmp_path: Path) -> None:
    data = ["--data-path", folder / "tokens", "--data-cache-path", tmp_path / "cache", "--reset-position-ids",
            "--eod-mask-loss", *files_of(folder)]  # fmt: skip
    options = {"flags": WITHOUT_TOKENIZER, "world_size": 2}
    assert train(*data, *save_to(tmp_path / "whole"), **options) is None
    assert train(*data, *save_to(tmp_path / "halves"), "--exit-interval", "3", **options) is None
    assert train(*data, *save_to(tmp_path / "halves"), **options) is None
    whole, halves = losses_of(tmp_path / "whole"), losses_of(tmp_path / "halves")
    assert sorted(whole) == list(range(1, 7)) and whole == halves


def test_half_of_the_pair_or_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    from megatron_recursive.training.patches import gpt2_tokenizer

    said = train("--tokenizer-type", "GPT2BPETokenizer", "--mock-data", flags=WITHOUT_TOKENIZER)
    assert said == "--tokenizer-type GPT2BPETokenizer needs --vocab-file and --merge-file."
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(UserError, match="vocab.json and --merge-file .* are no GPT-2 tokenizer"):
        gpt2_tokenizer.build(arguments(tmp_path))


def test_a_run_trains_on_parts_that_were_not_joined(folder: Path, tmp_path: Path) -> None:
    """Their list is for --data-args-path; the tokenizer of each is compared with the run's."""
    choice = TokenizerChoice(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))
    preprocess([folder / "corpus.jsonl"], tmp_path / "x", choice, options=Options(join=False, part_bytes=1500))
    assert len(list(tmp_path.glob("x_*.idx"))) > 2
    data = ["--data-args-path", tmp_path / "x.data_args", "--data-cache-path", tmp_path / "cache"]
    flags = [*WITHOUT_TOKENIZER, "--split", "1"]
    assert train(*data, *files_of(folder), *save_to(tmp_path / "run"), flags=flags) is None
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 6 and losses[6] < losses[1]
    (tmp_path / "tok").mkdir()
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"{n * n} other"}) + "\n" for n in range(900)))
    train_tokenizer([tmp_path / "other.jsonl"], tmp_path / "tok", 400)
    refused = train(*data, *files_of(tmp_path / "tok"), flags=flags)
    assert refused is not None and f"{tmp_path}/x_00000 was prepared with" in refused
