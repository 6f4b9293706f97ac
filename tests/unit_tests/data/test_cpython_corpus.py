import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_recursive.data.cpython_corpus import MIN_CHARACTERS, is_held_out, write_cpython_corpus

ROOT = Path(__file__).parents[3]


def read(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_cpython_corpus(tmp_path_factory.mktemp("corpus") / "new")


@pytest.fixture(scope="module")
def splits(corpus):
    return read(corpus.train_file), read(corpus.valid_file)


@pytest.mark.grid
def test_another_process_writes_the_same_bytes(corpus, tmp_path):
    # Another hash seed: the order of sets must not reach the files.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    command = [sys.executable, ROOT / "tools/build_corpus.py", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"documents of Python {platform.python_version()}:",
        f"  out/train.jsonl: {corpus.train_documents:,} documents, {corpus.train_characters:,} characters",
        f"  out/valid.jsonl: {corpus.valid_documents:,} documents, {corpus.valid_characters:,} characters",
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train.jsonl", "valid.jsonl"]
    for file in (corpus.train_file, corpus.valid_file):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_the_splits_are_disjoint_and_counted(corpus, splits):
    train, valid = splits
    assert (len(train), len(valid)) == (corpus.train_documents, corpus.valid_documents)
    assert sum(len(d["text"]) for d in train) == corpus.train_characters > 1_000_000
    assert sum(len(d["text"]) for d in valid) == corpus.valid_characters
    ids = [d["id"] for d in train + valid]
    assert len(set(ids)) == len(ids)
    assert 0.02 < len(valid) / len(ids) < 0.10
    assert all(is_held_out(d["id"]) for d in valid) and not any(is_held_out(d["id"]) for d in train)


def test_held_out_paragraphs_are_not_in_the_training_split(splits):
    train, valid = ([" ".join(p.split()) for d in split for p in d["text"].split("\n\n")] for split in splits)
    # Short phrases of base classes recur in subclasses ("Remove and return an item from the queue"), topics do not.
    known = {p for p in train if len(p) >= 60}
    assert sum(len(p) for p in valid if p in known) < 0.02 * sum(map(len, valid))


def test_documents_are_clean_prose(splits):
    documents = {d["id"]: d["text"] for split in splits for d in split}
    assert documents["modules/calendar"].startswith("calendar\n\nCalendar printing functions\n\nNote when comparing")
    assert "\n\nCalendar.iterweekdays\n\nReturn an iterator for one week" in documents["modules/calendar"]
    assert "topics/while" not in documents  # all of it stands in topics/compound
    assert not any(id.startswith("modules/test.") for id in documents)
    for text in documents.values():
        assert len(text) >= MIN_CHARACTERS
        assert "\n\n\n" not in text and " \n" not in text and text == text.strip()
