"""Large inputs: parts that are whole files, left unjoined, or joined by a run that was interrupted."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_recursive.data import joining, sources
from megatron_recursive.data import preprocess as preprocess_module
from megatron_recursive.data.preparation import read_preparation
from megatron_recursive.data.preprocess import Options, preprocess
from megatron_recursive.data.progress import note_count, read_counts
from megatron_recursive.data.sources import find_files, plan_parts
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.data.work_folder import WorkFolder
from megatron_recursive.errors import UserError

TEXTS = [f"Document {n} says {'again and ' * (n % 7)}that the loss falls." for n in range(200)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    train_tokenizer([folder / "train.jsonl"], folder / "tok", 320)
    preprocess([folder / "train.jsonl"], folder / "whole", folder / "tok")
    return folder


def run(corpus, prefix, join=True, **more):
    options = Options(join=join, part_bytes=1500)
    return preprocess([corpus / "train.jsonl"], prefix, corpus / "tok", options=options, **more)


def read(prefix):
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def listed(prefix):
    words = Path(f"{prefix}.data_args").read_text().split()
    return [int(word) for word in words[::2]], words[1::2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_parts_are_left_apart_with_a_list_of_them(corpus, tmp_path, capsys):
    summary = run(corpus, tmp_path / "x", join=False)
    tokens, prefixes = listed(tmp_path / "x")
    assert len(prefixes) > 4 and prefixes[0] == f"{tmp_path}/x_00000"
    assert [document for prefix in prefixes for document in read(prefix)] == read(corpus / "whole")
    assert tokens == [sum(map(len, read(prefix))) for prefix in prefixes] == [
        read_preparation(prefix).tokens for prefix in prefixes
    ]
    assert (summary.documents, summary.tokens) == (len(TEXTS), sum(tokens))
    lengths = sorted(map(len, read(corpus / "whole")))
    told = summary.statistics
    assert (told.documents, told.tokens, told.lengths["max"]) == (len(TEXTS), sum(tokens), lengths[-1])
    assert len(names(tmp_path)) == 1 + 3 * len(prefixes)
    assert run(corpus, tmp_path / "x", join=False) == summary
    assert "was made by this command already" in capsys.readouterr().err
    os.truncate(f"{prefixes[1]}.bin", 10)
    with pytest.raises(UserError, match=r"x: .data_args is there already, made otherwise; name another"):
        run(corpus, tmp_path / "x", join=False)
    (tmp_path / "b.jsonl").write_text('{"text": "other"}')
    preprocess([tmp_path / "b.jsonl"], tmp_path / "x", corpus / "tok", overwrite=True, options=Options(join=False))
    assert names(tmp_path) == ["b.jsonl", "x.data_args", "x_00000.bin", "x_00000.idx", "x_00000.idx.json"]
    with pytest.raises(UserError, match="--no-join writes a list in which .* would be several words"):
        run(corpus, tmp_path / "a b", join=False)


@pytest.mark.parametrize("stop", range(4))
def test_an_interrupted_publication_goes_on(corpus, tmp_path, monkeypatch, stop):
    replace, calls = os.replace, []

    def failing(source, target):
        if str(target).startswith(f"{tmp_path}/x_00002") or calls:
            calls.append(target)
            if len(calls) > stop:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(joining.os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "x", join=False)
    monkeypatch.undo()
    assert not (tmp_path / "x.data_args").exists()
    run(corpus, tmp_path / "x", join=False)
    assert [document for prefix in listed(tmp_path / "x")[1] for document in read(prefix)] == read(corpus / "whole")
    assert not (tmp_path / "x.partial").exists()


def test_an_interrupted_join_goes_on_where_it_was(corpus, tmp_path, monkeypatch):
    """The mark is of the first parts as they are now: a part made anew begins the join anew."""
    copy, copied = shutil.copyfileobj, []

    def failing(source, out, size):
        if len(copied) == 3:
            out.write(b"half of a part")
            raise KeyboardInterrupt
        copied.append(Path(source.name).name)
        copy(source, out, size)

    def noting(source, out, size):
        copied.append(Path(source.name).name)
        copy(source, out, size)

    monkeypatch.setattr(joining, "MARK_BYTES", 1)
    monkeypatch.setattr(joining.shutil, "copyfileobj", failing)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "x")
    assert copied == ["00000.bin", "00001.bin", "00002.bin"] and not (tmp_path / "x.bin").exists()
    shutil.copytree(tmp_path / "x.partial", tmp_path / "y.partial")  # with new dates of the parts
    for prefix, first in (("x", "00003.bin"), ("y", "00000.bin")):
        copied.clear()
        monkeypatch.setattr(joining.shutil, "copyfileobj", noting)
        if prefix == "y":
            os.utime(tmp_path / "y.partial/parts/00001.bin")
        run(corpus, tmp_path / prefix)
        assert copied[0] == first
        for end in (".bin", ".idx"):
            assert (tmp_path / f"{prefix}{end}").read_bytes() == (corpus / f"whole{end}").read_bytes()
    assert names(tmp_path) == ["x.bin", "x.idx", "x.idx.json", "y.bin", "y.idx", "y.idx.json"]


def write_parquet(file, rows, group):
    values = numpy.random.default_rng(rows).bytes(32 * rows).hex()
    table = pyarrow.table({"text": [values[64 * n : 64 * n + 64] for n in range(rows)]})
    pyarrow.parquet.write_table(table, file, row_group_size=group)


def test_whole_files_need_no_footer_and_others_are_read_in_threads_once(tmp_path, monkeypatch):
    for n in range(8):
        write_parquet(tmp_path / f"{n}.parquet", 50 if n % 2 else 300, 20)
    files = find_files([tmp_path])
    limit = files[1].size
    assert limit < files[0].size / 2
    sizes, threads = sources.row_group_sizes, []

    def slowly(path):
        threads.append(threading.get_ident())
        time.sleep(0.1)
        return sizes(path)

    monkeypatch.setattr(sources, "row_group_sizes", slowly)
    parts = plan_parts(files, limit)
    assert len(threads) == 4 == len(set(threads))
    spans = [span for part in parts for span in part]
    assert [span for span in spans if span.stop is None] == [sources.whole(file) for file in files[1::2]]
    assert len([span for span in spans if span.path == files[0].path]) > 2
    assert plan_parts(files, limit) == parts and len(threads) == 4


def test_an_interrupted_run_plans_nothing_anew(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_module, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "x")
    monkeypatch.undo()
    monkeypatch.setattr(preprocess_module, "plan_parts", lambda *args: pytest.fail("planned anew"))
    run(corpus, tmp_path / "x")
    assert read(tmp_path / "x") == read(corpus / "whole")


def test_counts_of_all_parts_lie_in_one_small_file(tmp_path):
    work = WorkFolder(tmp_path)
    assert read_counts(work.counts) == (0, 0)
    for rank, documents, size in ((3, 5, 50), (1, 7, 70), (3, 6, 60)):
        note_count(work.counts, rank, documents, size)
    assert read_counts(work.counts) == (13, 130) and work.counts.stat().st_size == 64
