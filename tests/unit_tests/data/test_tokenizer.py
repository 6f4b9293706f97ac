import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_recursive.command_line import command
from megatron_recursive.data.sources import find_files
from megatron_recursive.data.tokenizer import TokenizerChoice, load_encoder, load_tokenizer, store_tokenizer
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.errors import UserError

ROOT = Path(__file__).parents[3]
TEXT = "The model reads its own output state again, and the loss falls with each refinement block.\n" * 20


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(TEXT, "utf-8")
    return tmp_path / "corpus"


def test_round_trip_special_tokens_and_determinism(tmp_path, corpus):
    trained = train_tokenizer([corpus], tmp_path / "tok", 320)
    train_tokenizer([corpus], tmp_path / "again", 320)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "corpus", "tok"]
    for file in trained.folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()

    tokenizer = load_tokenizer(tmp_path / "tok")
    assert trained.vocab_size == len(tokenizer) == 320
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token_id == 0
    for text in (TEXT, " leading, double  space\n\ttab", "Größe 漢字 🙂\x00"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert 0 not in ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2


def test_a_folder_that_exists_is_replaced(tmp_path, corpus):
    train_tokenizer([corpus], tmp_path / "tok", 300)
    (tmp_path / "tok" / "README.md").write_text("mine")
    train_tokenizer([corpus], tmp_path / "tok", 310)
    assert len(load_tokenizer(tmp_path / "tok")) == 310
    assert (tmp_path / "tok" / "README.md").read_text() == "mine"
    with pytest.raises(UserError, match="of another kind .tokenizer.json., which would be read in place of this one"):
        train_tokenizer([corpus], tmp_path / "tok", 310, kind="sentencepiece")


def test_a_folders_tokenizers_and_unfinished_work_are_no_documents(tmp_path, corpus):
    train_tokenizer([corpus], tmp_path / "all" / "tok", 300)
    for name in ("a.jsonl", "b/c.txt", "train.partial/plan.json", "train.partial/parts/00000.json"):
        (tmp_path / "all" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "all" / name).write_text("{}")
    found = [each.path.removeprefix(f"{tmp_path}/all/") for each in find_files([tmp_path / "all"])]
    assert found == ["a.jsonl", "b/c.txt"]


def test_refusals(tmp_path, corpus):
    with pytest.raises(UserError, match="--vocab-size 299 is too small"):
        train_tokenizer([corpus], tmp_path / "tok", 299)
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match="holds no text"):
        train_tokenizer([tmp_path / "blank.jsonl"], tmp_path / "tok", 300)
    with pytest.raises(UserError, match="blank.jsonl is a file; name a folder"):
        train_tokenizer([corpus], tmp_path / "blank.jsonl", 300)
    assert not (tmp_path / "tok").exists()

    with pytest.raises(UserError, match=re.escape(f"does not exist; make one with {command('tokenizer')}")):
        load_tokenizer(tmp_path / "tok")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(corpus)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path / "broken")


def test_the_command_reports_a_malformed_line_without_a_traceback(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": \n', "utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/train_tokenizer.py", "--input", bad, "--output", "tok", "--vocab-size", "300"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {bad}:2 is not valid JSON")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_all_ways_to_name_a_tokenizer_give_the_same_ids(tmp_path, corpus):
    folder = train_tokenizer([corpus], tmp_path / "tok", 320).folder
    (tmp_path / "gpt2").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "gpt2" / name).write_bytes((folder / name).read_bytes())
    two_files = TokenizerChoice(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))
    expected = load_tokenizer(folder).encode(TEXT, add_special_tokens=False)
    for number, choice in enumerate((TokenizerChoice(str(folder)), TokenizerChoice(str(tmp_path / "gpt2")), two_files)):
        (tmp_path / str(number)).mkdir()
        stored = store_tokenizer(choice, tmp_path / str(number))
        assert (stored.eod, stored.id_range) == (0, 320)
        assert load_encoder(stored)([TEXT, "", TEXT]) == [expected, [], expected]


def test_a_folders_truncation_and_padding_are_left_out(tmp_path, corpus):
    from tokenizers import Tokenizer

    folder = train_tokenizer([corpus], tmp_path / "tok", 320).folder
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    full = tokenizer.encode(TEXT).ids
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(folder / "tokenizer.json"))
    stored = store_tokenizer(TokenizerChoice(str(folder)), tmp_path)
    assert load_encoder(stored)([TEXT, "a"]) == [full, tokenizer.encode("a").ids[:1]]


def test_sentencepiece_gives_the_text_back(tmp_path, corpus):
    trained = train_tokenizer([corpus], tmp_path / "sp", 300, kind="sentencepiece")
    train_tokenizer([corpus], tmp_path / "again", 300, kind="sentencepiece")
    model = trained.folder / "tokenizer.model"
    assert model.read_bytes() == (tmp_path / "again/tokenizer.model").read_bytes()
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    assert trained.vocab_size == processor.get_piece_size() <= 300
    ids = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    assert ids == (0, 1, 2, 3)
    for text in (TEXT, " leading, double  space\n\ttab", "Größe 漢字 🙂"):
        assert processor.decode(processor.encode(text)) == text


def test_files_that_are_no_tokenizer_are_named(tmp_path):
    (tmp_path / "x.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match="x.model is no SentencePiece model"):
        store_tokenizer(TokenizerChoice(str(tmp_path / "x.model")), tmp_path)
    with pytest.raises(UserError, match="--tokenizer .*y.model does not exist"):
        store_tokenizer(TokenizerChoice(str(tmp_path / "y.model")), tmp_path)
    with pytest.raises(UserError, match="--vocab-file .*none does not exist"):
        store_tokenizer(TokenizerChoice(vocab_file=str(tmp_path / "none"), merge_file="m"), tmp_path)
