"""Data sets of the hub, from a stand-in for its client: commits, configurations, splits, and reads that fail."""

import inspect
import io
import json
from types import SimpleNamespace

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import DatasetCardData, HfApi
from huggingface_hub.hf_api import RepoFile, RepoFolder

from megatron_recursive.data import hub, spans
from megatron_recursive.data.hub import HubChoice
from megatron_recursive.data.mixing import Mixture, mix
from megatron_recursive.data.preparation import read_preparation
from megatron_recursive.data.preprocess import Options, preprocess
from megatron_recursive.data.readers import iter_documents
from megatron_recursive.data.sources import find_files
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.errors import UserError

COMMIT = "8a" * 20


class StandIn:
    """As much of HfApi as is asked, and the file system of ``hf://``: one data set, in memory."""

    def __init__(self, monkeypatch):
        self.files, self.card, self.failures, self.asked, self.lost = {}, None, [], [], None
        api = SimpleNamespace(dataset_info=self.dataset_info, list_repo_tree=self.list_repo_tree)
        monkeypatch.setattr(hub, "hub_api", lambda: api)
        self.open_other = spans._open
        monkeypatch.setattr(spans, "_open", self.open)
        monkeypatch.setattr(spans, "WAIT_S", 0.0)

    def dataset_info(self, name, revision=None):
        inspect.signature(HfApi.dataset_info).bind(None, name, revision=revision)
        self.asked.append((name, revision))
        if self.failures:
            raise self.failures.pop(0)
        return SimpleNamespace(sha=COMMIT, card_data=self.card and DatasetCardData(**self.card))

    def list_repo_tree(self, name, **how):
        inspect.signature(HfApi.list_repo_tree).bind(None, name, **how)
        assert how == {"recursive": True, "revision": COMMIT, "repo_type": "dataset"}
        folders = {path.rpartition("/")[0] for path in self.files if "/" in path}
        yield from (RepoFolder(path=path, oid="") for path in folders)
        yield from (RepoFile(path=path, oid="", size=len(raw)) for path, raw in self.files.items())

    def open(self, path):
        if not path.startswith("hf://"):
            return self.open_other(path)
        if self.lost and path.endswith(self.lost):
            raise ConnectionError("lost")
        return Unsteady(self.files[path.partition(f"@{COMMIT}/")[2]], self.failures)


class Unsteady(io.BytesIO):
    """Reads a few bytes at a time, and fails as told."""

    def __init__(self, raw, failures):
        super().__init__(raw)
        self.failures = failures

    def readinto(self, buffer):
        if self.failures and self.tell():  # not before something was read
            raise self.failures.pop(0)
        return super().readinto(memoryview(buffer)[:37])


@pytest.fixture
def there(monkeypatch):
    return StandIn(monkeypatch)


def lines(*texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def found(given, *, configs=(), splits=()):
    prefix = f"hf://datasets/someone/corpus@{COMMIT}/"
    choice = HubChoice(configs, splits) if configs or splits else None
    return [file.path.removeprefix(prefix) for file in find_files([given], choice)]


def test_a_data_set_is_read_at_the_commit_that_its_revision_stands_for(there):
    there.files = {"README.md": b"x", "dataset_infos.json": b"{}", "data/a.jsonl": lines("one"), "b.txt": b"two"}
    assert found("hf://someone/corpus") == ["b.txt", "data/a.jsonl"]
    for revision, asked in (("", None), ("@v2", "v2"), ("@refs/pr/3", "refs/pr/3"), ("@refs%2Fpr%2F3", "refs/pr/3")):
        found(f"hf://datasets/someone/corpus{revision}/data")
        assert there.asked[-1] == ("someone/corpus", asked)
    assert [d.text for d in iter_documents(find_files(["hf://someone/corpus"]))] == ["two", "one"]
    for pattern, paths in {"data/*.jsonl": ["data/a.jsonl"], "*.jsonl": [], "**/*.jsonl": ["data/a.jsonl"],
                           "data": ["data/a.jsonl"], "b.txt": ["b.txt"]}.items():  # fmt: skip
        if paths:
            assert found(f"hf://someone/corpus/{pattern}") == paths
        else:
            with pytest.raises(UserError, match="holds no .txt"):
                found(f"hf://someone/corpus/{pattern}")


def test_a_data_set_is_mixed_with_files_from_here(there, tmp_path):
    there.files = {"train.jsonl": lines("one", "two"), "test.jsonl": lines("three")}
    (tmp_path / "here.txt").write_text("four")
    corpora = [[tmp_path / "here.txt"], ["hf://someone/corpus"]]
    made = mix(corpora, tmp_path / "x", Mixture(1), HubChoice(splits=("train",)))
    assert sorted(pyarrow.parquet.read_table(tmp_path / "x")["text"].to_pylist()) == ["four", "one", "two"]
    assert made["corpora"][1]["first_file"] == f"hf://datasets/someone/corpus@{COMMIT}/train.jsonl"
    with pytest.raises(UserError, match="--hf-split are for an --input hf://NAME"):
        mix(corpora[:1], tmp_path / "y", Mixture(1), HubChoice(splits=("train",)))


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (["data/train-00000-of-00002.parquet", "data/validation-00000-of-00001.parquet"], ["train", "validation"]),
        (["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"], ["train", "validation"]),
        (["train.jsonl", "dev.jsonl", "test_0.jsonl"], ["test", "train", "validation"]),
        (["training/a.jsonl", "val/a.jsonl"], ["train", "validation"]),
        (["data/first_half-00000-of-00001.parquet", "data/second-00000-of-00001.parquet"], ["first_half", "second"]),
        (["train.jsonl", "latest.jsonl"], ["(no split)", "train"]),
    ],
)
def test_several_splits_want_a_choice(there, paths, splits):
    there.files = dict.fromkeys(paths, b"x")
    with pytest.raises(UserError, match="hf://someone/corpus has several splits") as caught:
        found("hf://someone/corpus")
    assert f"several splits, {', '.join(splits)}; choose with --hf-split" in str(caught.value)
    assert [found("hf://someone/corpus", splits=(split,)) for split in sorted(splits)] != [[]] * len(splits)
    assert found("hf://someone/corpus", splits=tuple(splits)) == sorted(paths)
    assert found(f"hf://someone/corpus/{paths[0]}") == paths[:1]
    with pytest.raises(UserError, match="--hf-split dev2: --input hf://someone/corpus has no such split but"):
        found("hf://someone/corpus", splits=("dev2",))


def test_without_a_word_of_splits_all_is_for_training(there):
    there.files = {"part1.jsonl": b"x", "latest/part2.jsonl": b"x"}
    assert found("hf://someone/corpus", splits=("train",)) == found("hf://someone/corpus") == sorted(there.files)


def test_configurations_are_those_of_the_card(there):
    there.card = {"configs": [
        {"config_name": "en", "data_files": [{"split": "train", "path": ["en/*.jsonl"]},
                                             {"split": "heldout", "path": "held/en.jsonl"}]},
        {"config_name": "de", "data_files": "./de/*"},
        {"config_name": "fr", "data_dir": "fr"},
        {"config_name": "it", "data_dir": "./it", "data_files": "deep/*"},
    ]}  # fmt: skip
    paths = ["en/1.jsonl", "en/2.jsonl", "held/en.jsonl", "de/1.jsonl", "fr/deep/1.jsonl", "it/1.jsonl",
             "it/deep/1.jsonl", "extra/1.jsonl"]  # fmt: skip
    there.files = dict.fromkeys(paths, b"x")
    with pytest.raises(UserError, match="has several configurations, de, en, fr, it; choose with --hf-config de"):
        found("hf://someone/corpus")
    with pytest.raises(UserError, match="has several splits, heldout, train; choose with --hf-split heldout"):
        found("hf://someone/corpus", configs=("en",))
    assert found("hf://someone/corpus", configs=("en",), splits=("train",)) == ["en/1.jsonl", "en/2.jsonl"]
    assert found("hf://someone/corpus", configs=("de", "fr")) == ["de/1.jsonl", "fr/deep/1.jsonl"]
    assert found("hf://someone/corpus", configs=("it",)) == ["it/deep/1.jsonl"]
    assert found("hf://someone/corpus/extra") == ["extra/1.jsonl"]  # of no configuration


def test_the_commit_is_stored(there, tmp_path, capsys):
    there.files = {"data/train.jsonl": lines(*(f"text {n}" for n in range(50))), "data/test.jsonl": lines("no")}
    (tmp_path / "a.jsonl").write_bytes(there.files["data/train.jsonl"])
    train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "tok", 300)
    there.failures = [ConnectionResetError("reset"), TimeoutError()]
    summary = preprocess(["hf://someone/corpus"], tmp_path / "x", tmp_path / "tok", hub=HubChoice(splits=("train",)))
    assert summary.documents == 50
    assert read_preparation(tmp_path / "x").revisions == [f"hf://datasets/someone/corpus@{COMMIT}"]
    assert f"reading hf://datasets/someone/corpus@{COMMIT}\n" in capsys.readouterr().err


class ForeignError(Exception):
    """As libraries of networks have them, with the answer of a server."""

    def __init__(self, status):
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_broken_connection_is_made_again_where_it_broke(there, kind, tmp_path):
    import gzip

    texts = [f"text {n} {hash(n) * 7919}" for n in range(300)]
    raw = lines(*texts)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=50)
        raw = (tmp_path / "a.parquet").read_bytes()
    there.files = {f"a.{kind}": gzip.compress(raw) if kind.endswith("gz") else raw}
    files = find_files(["hf://someone/corpus"])
    there.failures += [OSError("reset"), ForeignError(503), ForeignError(429), TimeoutError()]
    assert [document.text for document in iter_documents(files)] == texts and not there.failures
    there.failures += [OSError("reset")] * spans.ATTEMPTS
    with pytest.raises(UserError, match=rf"a.{kind} cannot be read at 5 tries \(OSError: reset\)"):
        list(iter_documents(files, reject=lambda error: None))  # no malformed document, so that nothing skips it


def test_what_lasts_is_not_tried_again(there):
    there.files = {"a.jsonl": lines("x")}
    for error in (ForeignError(404), FileNotFoundError("gone"), PermissionError("private")):
        there.failures, there.asked = [error] * 2, []
        with pytest.raises(UserError, match="hf://someone/corpus cannot be read .*check the name and the network"):
            find_files(["hf://someone/corpus"])
        assert len(there.asked) == 1
    there.failures = [KeyError("a defect of ours")]
    with pytest.raises(KeyError):
        find_files(["hf://someone/corpus"])


def test_a_part_fails_and_is_done_by_the_next_run(there, tmp_path):
    there.files = {"a.jsonl": lines(*(f"text {n}" for n in range(50))), "b.jsonl": lines(*"abcdefgh")}
    (tmp_path / "a.jsonl").write_bytes(there.files["a.jsonl"])
    train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "tok", 300)
    options = Options(on_error="skip", part_bytes=100)
    there.lost = "b.jsonl"
    with pytest.raises(UserError, match=r"b.jsonl cannot be read at 5 tries \(ConnectionError: lost\)"):
        preprocess(["hf://someone/corpus"], tmp_path / "x", tmp_path / "tok", options=options)
    kept = sorted((tmp_path / "x.partial" / "datatrove" / "completions").iterdir())
    assert len(kept) >= 3 and not (tmp_path / "x.bin").exists()
    there.lost = None
    assert preprocess(["hf://someone/corpus"], tmp_path / "x", tmp_path / "tok", options=options).documents == 58


def test_other_file_systems_are_read_as_before():
    fsspec.filesystem("memory").pipe("/hub/a.jsonl", lines("one", "two"))
    assert [document.text for document in iter_documents(find_files(["memory://hub"]))] == ["one", "two"]
