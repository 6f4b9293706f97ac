import json
import multiprocessing
import os
import signal
import struct
import time

import numpy
import pytest

from megatron_recursive.data.indexed import check_indexed_dataset, preprocess
from megatron_recursive.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_recursive.errors import UserError

# More than one batch of 64 documents, so that two workers get some each.
TEXTS = [f"Document {n} says {'again and ' * (n % 7)}that the loss falls." for n in range(200)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) for text in TEXTS[:100] + ["  "] + TEXTS[100:]]
    (folder / "train.jsonl").write_text("\n".join(lines), "utf-8")
    train_tokenizer([folder], folder / "tok", 320)
    return folder


@pytest.fixture(scope="module")
def written(corpus):
    preprocess([corpus], corpus / "sub" / "one", corpus / "tok")
    return corpus / "sub" / "one"


@pytest.fixture
def copy(written, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"train{suffix}").write_bytes(written.with_suffix(suffix).read_bytes())
    return tmp_path / "train"


def test_megatron_reads_the_tokens_back(corpus, written):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = load_tokenizer(corpus / "tok")
    dataset = IndexedDataset(str(written))
    assert len(dataset) == len(TEXTS)
    assert dataset.index.dtype == numpy.uint16
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))
    for text, tokens in zip(TEXTS, (dataset[i] for i in range(len(dataset))), strict=True):
        assert tokens.tolist() == [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def test_the_files_do_not_depend_on_the_workers(corpus, written, tmp_path):
    summary = preprocess([corpus], tmp_path / "two", corpus / "tok", workers=2)
    assert summary.documents == len(TEXTS)
    assert summary.tokens * 2 == summary.bin_file.stat().st_size
    for suffix in (".bin", ".idx"):
        assert written.with_suffix(suffix).read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two.bin", "two.idx"]


def test_no_append_eod_and_another_key(corpus, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "ab"}\n')
    with_eod = preprocess([tmp_path], tmp_path / "x", corpus / "tok", json_key="body")
    without = preprocess([tmp_path], tmp_path / "x", corpus / "tok", json_key="body", append_eod=False)
    assert without.tokens == with_eod.tokens - 1
    check_indexed_dataset(tmp_path / "x")


def test_a_mistake_leaves_an_earlier_dataset_alone(corpus, copy, tmp_path):
    before = copy.with_suffix(".bin").read_bytes()
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, "{", *lines]))
    with pytest.raises(UserError, match="bad.jsonl:201 is not valid JSON"):
        preprocess([tmp_path / "bad.jsonl"], copy, corpus / "tok")
    assert copy.with_suffix(".bin").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "train.bin", "train.idx"]
    check_indexed_dataset(copy)


def test_refusals(corpus, tmp_path):
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        preprocess([tmp_path], tmp_path / "x", corpus / "tok")
    with pytest.raises(UserError, match="tokenizer folder .* does not exist"):
        preprocess([corpus], tmp_path / "x", tmp_path / "none")
    with pytest.raises(UserError, match="--workers 0"):
        preprocess([corpus], tmp_path / "x", corpus / "tok", workers=0)
    with pytest.raises(UserError, match="without .bin"):
        preprocess([corpus], tmp_path / "x.bin", corpus / "tok")
    with pytest.raises(UserError, match="cannot write"):
        preprocess([corpus], tmp_path / "blank.txt" / "x", corpus / "tok")
    assert [p.name for p in tmp_path.iterdir()] == ["blank.txt"]


def test_a_killed_run_leaves_nothing_under_a_final_name(corpus, written, tmp_path):
    pipe = tmp_path / "endless.jsonl"
    os.mkfifo(pipe)
    # fork: the child has Megatron imported already. Its input never ends, so that it is killed in the middle.
    context = multiprocessing.get_context("fork")
    child = context.Process(target=preprocess, args=([pipe], tmp_path / "x", corpus / "tok"))
    child.start()
    with open(pipe, "wb") as stream:
        for text in TEXTS:
            stream.write(json.dumps({"text": text}).encode() + b"\n")
        stream.flush()
        partial = tmp_path / f"x.bin.partial-{child.pid}"
        deadline = time.monotonic() + 30
        while not partial.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert partial.exists()
        child.kill()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "x.idx").exists()
    with pytest.raises(UserError, match="x.bin does not exist"):
        check_indexed_dataset(tmp_path / "x")


def damage(change):
    def apply(prefix):
        file, edit = change
        path = prefix.with_suffix(file)
        path.write_bytes(edit(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda prefix: prefix.with_suffix(".bin").unlink(), "train.bin does not exist"),
        (lambda prefix: prefix.with_suffix(".idx").unlink(), "train.idx does not exist"),
        (damage((".bin", lambda raw: raw[:-2])), "train.bin has .* bytes but train.idx promises"),
        (damage((".bin", lambda raw: b"")), "train.bin has 0 bytes but train.idx promises"),
        (damage((".idx", lambda raw: raw[:-8])), "train.idx has .* bytes but its header promises"),
        (damage((".idx", lambda raw: raw[:20])), "train.idx is cut off after 20 bytes"),
        (damage((".idx", lambda raw: b"")), "train.idx is cut off after 0 bytes"),
        (damage((".idx", lambda raw: b"\x80\x04K\x01." * 20)), "train.idx is not an index"),
        (damage((".idx", lambda raw: raw[:34] + bytes(len(raw) - 34))), "train.idx is damaged"),
        (damage((".idx", lambda raw: raw[:18] + struct.pack("<QQ", 0, 1) + bytes(8))), "holds no document"),
        (damage((".idx", lambda raw: raw[:18] + struct.pack("<QQ", 2**63, 2**63))), "its header promises"),
    ],
)
def test_a_half_written_dataset_is_refused(copy, break_it, said):
    check_indexed_dataset(copy)
    break_it(copy)
    with pytest.raises(UserError, match=said) as caught:
        check_indexed_dataset(copy)
    assert "\n" not in str(caught.value) and "preprocess_data.py" in str(caught.value)


def test_a_prefix_with_its_suffix_is_explained(copy):
    with pytest.raises(UserError, match="give the prefix without .bin"):
        check_indexed_dataset(f"{copy}.bin")
