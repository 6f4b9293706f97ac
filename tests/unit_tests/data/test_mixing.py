"""Mixing: shares, one order for all, runs that were killed, faults. Documents say of which corpus they are."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from megatron_recursive.commands import main
from megatron_recursive.data import mixing
from megatron_recursive.data.mixing import Mixture, Task, mix
from megatron_recursive.data.sources import find_files
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.errors import UserError
from tests.grids import grid

SHARED = Mixture(4, [1.0, 3.0])
PART_BYTES = 150_000


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder, draws = tmp_path_factory.mktemp("corpora"), numpy.random.default_rng(0)
    for name, count in (("a", 1500), ("b", 500)):
        texts = [f"{name} {n} " + "é" * length for n, length in enumerate(draws.integers(1, 300, count))]
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in (folder / "b.jsonl").open()]})
    pyarrow.parquet.write_table(table, folder / "b.parquet", row_group_size=100)
    return folder


@pytest.fixture
def small_runs(monkeypatch):
    """Memory for 20 kB of text beside the libraries, so that there are many runs and pieces; as many processes."""
    monkeypatch.setattr(mixing, "ROW_GROUP_BYTES", 0)
    monkeypatch.setattr(mixing, "LIBRARIES_MB", 1024 - 0.06)
    monkeypatch.setattr(mixing, "SMALL_BYTES", 0)
    monkeypatch.setattr(mixing, "default_part_bytes", lambda files: PART_BYTES)


def rows(folder):
    files = sorted(Path(folder).glob("*.parquet"))
    return [pyarrow.parquet.read_table(file)["text"].to_pylist() for file in files]


def size(texts):
    return sum(len(text.encode()) for text in texts)


@pytest.fixture(scope="module")
def shared(corpora):
    """A mixture with shares, made in one go."""
    both = [[corpora / "a.jsonl"], [corpora / "b.jsonl"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "default_part_bytes", lambda files: PART_BYTES)  # documents have their keys by part
        mix(both, corpora / "shared", SHARED)
    return both, corpora / "shared"


def test_every_document_once_in_one_order_that_only_the_seed_changes(corpora, tmp_path, small_runs, monkeypatch):
    both = [[corpora / "a.jsonl"], [corpora / "b.parquet"]]
    made = mix(both, tmp_path / "small", Mixture(4))
    monkeypatch.undo()
    mix(both, tmp_path / "seed", Mixture(4, seed=1))
    shards = rows(tmp_path / "small")
    texts = [text for shard in shards for text in shard]
    given = [json.loads(line)["text"] for name in "ab" for line in (corpora / f"{name}.jsonl").open()]
    assert sorted(texts) == sorted(given) and made["corpora"][1]["documents"] == 500
    sizes = [size(shard) for shard in shards]
    assert max(sizes) - min(sizes) < 2 * 610  # two documents
    places = numpy.array([texts.index(text) for text in given])
    assert abs(numpy.corrcoef(places[:1500], numpy.arange(1500))[0, 1]) < 0.1
    assert all(80 < sum(text[0] == "b" for text in shard) < 170 for shard in shards)
    assert [text for shard in rows(tmp_path / "seed") for text in shard] != texts
    assert len(find_files([tmp_path / "small"])) == 4  # the record is no document
    assert not (tmp_path / "small.partial").exists()


def test_shares_are_exact_to_a_document_and_the_same_everywhere(shared, capsys):
    both, folder = shared
    shards = rows(folder)
    texts = [text for shard in shards for text in shard]
    assert len(set(texts)) == len(texts)
    assert sum(text[0] == "b" for text in texts) == 500  # it runs out first, and sets the size
    of_a = size(text for text in texts if text[0] == "a")
    assert abs(of_a - (size(texts) - of_a) / 3) < 610
    assert all(0.15 < size(text for text in shard if text[0] == "a") / size(shard) < 0.35 for shard in shards)
    again = mix(both, folder, SHARED)
    statistics = again["statistics"]
    assert (statistics["documents"], statistics["bytes"]) == (len(texts), size(texts))
    assert statistics["lengths"]["max"] == max(len(text.encode()) for text in texts)
    assert [*statistics["dropped"].values()] == [2000 - len(texts)]
    assert "nothing is done" in capsys.readouterr().err
    with pytest.raises(UserError, match="there already, and not of these"):
        mix(both, folder, Mixture(3))


def test_the_commands_end_with_statistics_as_table_and_json(corpora, tmp_path, capsys):
    train_tokenizer([corpora / "b.jsonl"], tmp_path / "tok", 320)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"txt": 1}\n{"text": 2}\n{"txt": 1}\n{"text": "two"}\n')
    mixing_two = ["mix", "--input", corpora / "a.jsonl", "--input", tmp_path / "c.jsonl", "--weights", "1", "2",
                  "--output", tmp_path / "x", "--num-shards", "1"]  # fmt: skip
    preparing = ["preprocess", "--input", tmp_path / "c.jsonl", "--output", tmp_path / "c", "--tokenizer",
                 tmp_path / "tok"]  # fmt: skip
    for command, expected in ((mixing_two, ("documents left out", "bytes of text", "% of the text", "MB at most")),
                              (preparing, ("tokens", "length p90"))):  # fmt: skip
        main([*map(str, command), "--on-error", "skip"])
        *said, last = capsys.readouterr().out.splitlines()
        table = "\n".join(said)
        assert all(words in table for words in expected), table
        assert "2 malformed  has no key 'txt'" not in table and "2 malformed  has no key" in table
        assert f"the first: {tmp_path}/c.jsonl:2 has no key" in table
        found = json.loads(last).get("statistics", json.loads(last))
        assert json.loads(last)["skipped"] == 3 and [each["count"] for each in found["malformed"]] == [2, 1]


@pytest.mark.grid
def test_the_number_of_workers_changes_nothing(shared, tmp_path, small_runs):
    mix(shared[0], tmp_path / "x", SHARED, workers=2)
    assert rows(tmp_path / "x") == rows(shared[1])


def killed_at(stage, rank, *call):
    original = getattr(Task, stage)

    def die(self, number, report):
        if number == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, number, report)

    setattr(Task, stage, die)  # in this process alone, which a fork made
    mix(*call)


@pytest.mark.parametrize(("stage", "rank"), grid([("spill", 2), ("shard", 2), ("publish", 0)], quick=[("shard", 2)]))
def test_a_killed_run_goes_on_from_what_is_complete(stage, rank, shared, tmp_path, small_runs, monkeypatch):
    call = shared[0], tmp_path / "x", SHARED
    process = multiprocessing.get_context("fork").Process(target=killed_at, args=(stage, rank, *call))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "x").exists()
    parts = sum(json.loads((tmp_path / "x.partial" / "corpora.json").read_text()))
    calls, run = [], Task.__call__

    def noted(task, *words):
        calls.append((task.stage, *words[1:2]))
        run(task, *words)

    monkeypatch.setattr(Task, "__call__", noted)
    mix(*call)
    every = [*(("spill", n) for n in range(parts)), *(("shard", n) for n in range(4)), ("publish",)]
    assert calls == every[every.index((stage, rank)) if rank else -1 :]
    assert rows(tmp_path / "x") == rows(shared[1])  # which had memory for all at once


def limited(*call):
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        mix(*call)
    except UserError as error:
        print(error, file=sys.stderr)
        os._exit(2)


def test_faults_are_told_in_a_sentence_and_leave_no_folder(corpora, tmp_path, capfd):
    whole = (corpora / "b.parquet").read_bytes()
    cases = {"cut off": whole[:-100], "scrambled": whole[:200] + bytes(len(whole) - 300) + whole[-100:]}
    for name, raw in cases.items():
        file = tmp_path / f"{name}.parquet"
        file.write_bytes(raw)
        with pytest.raises(UserError, match=rf"{name}.parquet is no readable .parquet file \(.*\); mend it or leave"):
            mix([[corpora / "a.jsonl"], [file]], tmp_path / "x", Mixture(2))
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": 1}\n')
    with pytest.raises(UserError, match="bad.jsonl:2 has no key 'text'"):
        mix([[tmp_path / "bad.jsonl"]], tmp_path / "x", Mixture(1))
    with pytest.raises(UserError, match="--num-shards 9 is more than there are documents, 1"):
        mix([[tmp_path / "bad.jsonl"]], tmp_path / "x", Mixture(9, on_error="skip"))
    for mixture, words in ((Mixture(0), "--num-shards 0 and"), (Mixture(1, [1.0]), "--weights 1 must"),
                           (Mixture(1, [1.0, -1.0]), "--weights 1 -1 must")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            mix([[corpora / "a.jsonl"], [corpora / "b.jsonl"]], tmp_path / "x", mixture)
    process = multiprocessing.get_context("fork").Process(
        target=limited, args=([[corpora / "a.jsonl"]], tmp_path / "x", Mixture(2))
    )
    process.start()
    process.join(60)
    said = capfd.readouterr().err
    assert process.exitcode == 2 and "cannot write" in said and "File too large" in said and "Traceback" not in said
    assert not (tmp_path / "x").exists()


@pytest.mark.grid
def test_a_corpus_larger_than_the_memory_is_mixed_within_it(tmp_path):
    text = "".join(f"{n} once upon a time " for n in range(100))
    with open(tmp_path / "big.jsonl", "w") as stream:
        for n in range(400 * 2**20 // len(text)):
            stream.write(json.dumps({"text": f"{n} {text}"}) + "\n")
    command = [sys.executable, "tools/mix.py", "--input", tmp_path / "big.jsonl", "--output", tmp_path / "out",
               "--num-shards", "2", "--memory-mb", "288", "--workers", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert json.loads(done.stdout.splitlines()[-1])["peak_memory_mb"] < 288
