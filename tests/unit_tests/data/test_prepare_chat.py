"""From files of conversations to a chat dataset: formats, dirt, lengths, what is written and what is said of it."""

from __future__ import annotations

import bz2
import gzip
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import dill
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from megatron_recursive.commands import main
from megatron_recursive.data import preprocess as preprocess_module
from megatron_recursive.data.chat.options import ChatOptions
from megatron_recursive.data.preparation import read_preparation
from megatron_recursive.data.preprocess import Options, preprocess
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.data.work_folder import WorkFolder
from megatron_recursive.errors import UserError
from tests.unit_tests.data.chat_templates import GENERATION, SMOLLM2
from tests.unit_tests.data.test_preprocess import scripts

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 🙂"}]}
SHAREGPT = {"conversations": [
    {"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."},
    {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}  # fmt: skip
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def reply(text: str, role: str, rank: int | None = None, *replies: Any, **more: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "rank": rank, "replies": [*replies], **more}


TREE = {"message_tree_id": "1", "prompt": reply(
    "Q", "prompter", None, reply("worse", "assistant", 1, reply("unanswered", "prompter")),
    reply("best", "assistant", 0, reply("more?", "prompter", None, reply("yes", "assistant", 0))),
    reply("gone", "assistant", None, deleted=True))}  # fmt: skip
BAD = {
    "two user turns in a row": {"messages": [GOOD["messages"][0]] * 2},
    "without a role": {"messages": [{"content": "Hi"}, *GOOD["messages"]]},
    "of unknown role ('narrator')": {"conversations": [{"from": "narrator", "value": "Once"}]},
    "null or missing": {"messages": [GOOD["messages"][0], {"role": "assistant", "content": None}]},
    "has an empty turn 2": {"messages": [GOOD["messages"][0], {"role": "assistant", "content": " \n"}]},
    "begins with the assistant": {"messages": GOOD["messages"][::-1]},
    "has no assistant turn": {"messages": GOOD["messages"][:1]},
    "no conversation of a known format (its keys: 'text')": {"text": "Once"},
    "a single message of a tree": {"parent_id": "1", "text": "Once"},
    "half a surrogate pair": {"messages": [GOOD["messages"][0], {"role": "assistant", "content": "\ud800"}]},
    "a turn 2 that is not UTF-8": {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "name": "\ud800"}]},
    "no JSON object": {"messages": ["Hi"]},
    "has a turn 2 of weight 0.5, where 0 and 1 are known": {
        "messages": [GOOD["messages"][0], {**GOOD["messages"][1], "weight": 0.5}]},
    "a turn 0 that is not UTF-8": {**GOOD, "system": "\ud800"},
    "has a list under 'system', which must be a string": {**GOOD, "system": ["Be kind."]},
    "has tools, whose definitions are not written here": {**GOOD, "tools": [{"name": "search"}]},
    "has a history that is no list of pairs of texts": {**ALPACA, "history": [["One?"]]},
}  # fmt: skip


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tok")
    (folder / "text.txt").write_text("Hello, so be kind. user assistant system " * 50)
    train_tokenizer([folder / "text.txt"], folder / "tok", 300)
    return folder / "tok"


@pytest.fixture
def chatml(tok: Path, tmp_path: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tok)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = SMOLLM2
    tokenizer.save_pretrained(tmp_path / "chatml")
    return tmp_path / "chatml"


def lines(file: Path, *records: Any) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records), "utf-8")
    return file


def texts(prefix: Path, only_supervised: bool = False) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(f"{prefix}_tokenizer")
    samples, masks = IndexedDataset(str(prefix)), IndexedDataset(f"{prefix}_supervised")
    assert masks.index.dtype == numpy.uint8 and [*samples.sequence_lengths] == [*masks.sequence_lengths]
    assert sum(int(masks[n].sum()) for n in range(len(masks))) == read_preparation(prefix).supervised_tokens
    kept = [samples[n][masks[n] == 1] if only_supervised else samples[n] for n in range(len(samples))]
    return [tokenizer.decode(ids) for ids in kept]


def test_all_formats_of_a_folder_with_the_default_template(tok: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "in"
    lines(folder / "a.jsonl", SHAREGPT)
    (folder / "b.json").write_text("\ufeff" + json.dumps([ALPACA, ALPACA], indent=1), "utf-8")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(TREE).encode() + b"\n"))
    (folder / "d.json.bz2").write_bytes(bz2.compress(json.dumps(GOOD).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD | {"system": None}] * 2), folder / "e.parquet")
    prefix = tmp_path / "out/x"
    main(["prepare-chat", "--input", str(folder), "--output", str(prefix), "--tokenizer", str(tok), "--show", "1"])
    said = capsys.readouterr()
    hello = "<|user|>Hi<|enduser|><|sep|><|assistant|>Hello 🙂<|endassistant|>"
    added = "<|user|>Add.\n\n1 2<|enduser|><|sep|><|assistant|>3<|endassistant|>"
    found = texts(prefix)
    assert found == [
        "<|system|>Be kind.<|endsystem|><|sep|><|user|>Hi<|enduser|><|sep|><|assistant|>Hello.<|endassistant|><|sep|>"
        "<|user|>Why?<|enduser|><|sep|><|assistant|>So.<|endassistant|>", added, added,
        "<|user|>Q<|enduser|><|sep|><|assistant|>best<|endassistant|><|sep|><|user|>more?<|enduser|><|sep|><|assistant|>"
        "yes<|endassistant|>", hello, hello, hello]  # fmt: skip
    assert texts(prefix, True)[:2] == ["Hello.<|endassistant|>So.<|endassistant|>", "3<|endassistant|>"]
    assert "<|assistant|>[[Hello.<|endassistant|>]]<|sep|>" in said.out
    assert f"--hf MODEL --out CKPT --resize-vocab {prefix}_tokenizer" in said.err
    counts = json.loads(said.out.splitlines()[-1])
    made = read_preparation(prefix)
    assert (made.kind, made.documents, made.vocab_size) == ("chat", 7, len(AutoTokenizer.from_pretrained(tok)) + 7)
    assert counts == {**made.statistics, "skipped": 0} and counts["supervised_tokens"] == made.supervised_tokens
    dataset = IndexedDataset(str(prefix))
    lengths = sorted(dataset.sequence_lengths.tolist())
    assert counts["lengths"] == {"p50": lengths[3], "p90": lengths[6], "max": lengths[6]}
    names = sorted(file.name for file in prefix.parent.iterdir())
    assert names == ["x.bin", "x.idx", "x.idx.json", "x_supervised.bin", "x_supervised.idx", "x_tokenizer"]
    main(["prepare-chat", "--input", str(folder), "--output", str(prefix), "--tokenizer", str(tok)])
    again = capsys.readouterr()
    assert "nothing is done" in again.err and json.loads(again.out.splitlines()[-1]) == counts
    shutil.rmtree(f"{prefix}_tokenizer")
    with pytest.raises(SystemExit):
        main(["prepare-chat", "--input", str(folder), "--output", str(prefix), "--tokenizer", str(tok)])
    assert "x_tokenizer is gone; prepare the data again (--overwrite)" in capsys.readouterr().err


def test_all_paths_of_a_tree(chatml: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", TREE)
    preprocess([file], tmp_path / "x", chatml, options=Options(chat=ChatOptions(paths="all")))
    assert texts(tmp_path / "x", True) == ["best<|im_end|>yes<|im_end|>", "worse<|im_end|>"]


def test_what_stands_beside_the_turns_is_not_lost(chatml: Path, tmp_path: Path) -> None:
    """A system's text of its own, earlier exchanges, and what the author of the data has taken out of the loss."""
    hi, hello = GOOD["messages"]
    own = {**SHAREGPT, "system": "not this one"}
    talk = [hi, {**hello, "weight": 0}, hi, {**hello, "content": "yes", "weight": 1}]
    given = [{**GOOD, "system": "Be brief."}, own, {**ALPACA, "system": "", "history": [["One?", "1"]]},
             {"messages": talk}, {"messages": [hi, hello, hi, {**hello, "train": False}]}]  # fmt: skip
    columns = {key: [each.get(key) for each in given] for key in {key for each in given for key in each}}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    for kind in ("in.jsonl", "in.parquet"):
        file = lines(tmp_path / kind, *given) if kind == "in.jsonl" else tmp_path / kind
        prefix = tmp_path / kind[3:]
        preprocess([file], prefix, chatml, options=Options(chat=ChatOptions()))
        assert texts(prefix, True) == ["Hello 🙂<|im_end|>", "Hello.<|im_end|>So.<|im_end|>", "1<|im_end|>3<|im_end|>",
                                       "yes<|im_end|>", "Hello 🙂<|im_end|>"]  # fmt: skip
        first, second, third, *_ = texts(prefix)
        assert first.startswith("<|im_start|>system\nBe brief.<|im_end|>") and "not this one" not in second
        assert "user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nAdd." in third
    last = preprocess([file], tmp_path / "last", chatml, options=Options(chat=ChatOptions(train_on="last")))
    assert last.documents == 4
    assert last.statistics.dropped == {"samples left out, since nothing in them is supervised": 1}
    preprocess([file], tmp_path / "all", chatml, options=Options(chat=ChatOptions(train_on="all")))
    counted = texts(tmp_path / "all", True)[3]
    assert "user\nHi" in counted and counted.endswith("yes<|im_end|>\n") and "Hello" not in counted


def test_what_a_template_or_a_text_does_to_ends_is_said(chatml: Path, tmp_path: Path, capsys: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatml)
    spelled = {"messages": [{"role": "user", "content": "what is <|im_end|>?"}, GOOD["messages"][1]]}
    file = lines(tmp_path / "in.jsonl", GOOD, spelled)
    made = preprocess([file], tmp_path / "x", chatml, options=Options(chat=ChatOptions()))
    (why,) = made.statistics.dropped
    assert made.documents == 2 and made.statistics.dropped[why] == 1 and "a special token is written out" in why
    assert "WARNING" not in capsys.readouterr().err
    without = GENERATION.replace("{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
                                 "{{ message['content'] }}{% endgeneration %}<|im_end|>")  # fmt: skip
    for name, template in (("without", without), ("named", {"rag": SMOLLM2, "tool": SMOLLM2})):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    preprocess([file], tmp_path / "y", tmp_path / "without", options=Options(chat=ChatOptions()))
    assert "leaves the token that ends a turn out of" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has no default chat template \(only: rag, tool\)"):
        preprocess([file], tmp_path / "z", tmp_path / "named", options=Options(chat=ChatOptions()))


@pytest.mark.parametrize("why", BAD)
def test_dirt_is_named_by_file_and_line_or_skipped_and_counted(chatml: Path, tmp_path: Path, why: str) -> None:
    file = lines(tmp_path / "in/a b.jsonl", GOOD, BAD[why], GOOD)
    with pytest.raises(UserError) as caught:
        preprocess([file], tmp_path / "out/x", chatml, options=Options(chat=ChatOptions()))
    assert str(caught.value).startswith(f"{file}:2 ") and why in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]
    made = preprocess([file], tmp_path / "out/x", chatml, options=Options(on_error="skip", chat=ChatOptions()))
    assert (made.documents, made.skipped) == (2, 1)
    assert made.statistics.malformed[0]["first"] == str(caught.value) and "a b.jsonl:2" in made.statistics.table()


def test_what_stands_before_the_damage_of_a_file_is_kept(chatml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    whole = lines(folder / "a.jsonl", GOOD, GOOD).read_bytes()
    (folder / "a.jsonl").write_bytes(whole[:-9])
    (folder / "b.json").write_text(json.dumps([GOOD, GOOD], indent=1)[:-9])
    (folder / "b2.json").write_text(json.dumps([GOOD]) + "\n" + json.dumps([GOOD]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(whole)[:-12])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), folder / "d.parquet")
    (folder / "d.parquet").write_bytes((folder / "d.parquet").read_bytes()[:-9])
    (folder / "e.jsonl").write_bytes(b"\xff\xfe\n" + whole)
    long = {"messages": [GOOD["messages"][0], {"role": "assistant", "content": "so " * 50_000}]}
    lines(folder / "f.jsonl", GOOD | {"note": "so " * 3_500_000}, long)
    options = Options(on_error="skip", chat=ChatOptions(seq_length=100))
    made = preprocess([folder], tmp_path / "x", chatml, options=options)
    places = " ".join(each["first"] for each in made.statistics.malformed)
    assert (made.documents, made.skipped) == (7, 6), made
    for name in ("a.jsonl:2 ", "b.json:", "b2.json:2 goes on behind", "c.jsonl.gz:", "d.parquet ", "e.jsonl:1 "):
        assert f"{folder}/{name}" in places, places
    assert made.statistics.dropped == {"samples left out, longer than --seq-length": 1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--format", "alpaca"], r"in.jsonl:1 is no alpaca conversation \(its keys: 'messages'\); mend or remove it"),
     (["--overflow", "split"], "--overflow split says what becomes of longer samples; give --seq-length too"),
     (["--max-turns", "1"], "--max-turns 1 is too few"),
     (["--seq-length", "2"], "holds nothing to train on .*longer than --seq-length"),
     (["--input", "notes.txt"], "notes.txt, which is text and no conversations")],
)  # fmt: skip
def test_refusals(flags: list[str], message: str, chatml: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lines(Path("in.jsonl"), GOOD)
    Path("notes.txt").write_text("a")
    argv = ["prepare-chat", "--input", "in.jsonl", "--output", "x", "--tokenizer", str(chatml), *flags]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    assert re.search(message, err), err
    assert {file.name for file in Path().glob("x*")} <= {"x.partial"}


def test_a_tokenizer_of_the_users_is_not_replaced(chatml: Path, tmp_path: Path) -> None:
    file, own = lines(tmp_path / "in.jsonl", GOOD), tmp_path / "x_tokenizer"
    own.mkdir()
    (own / "mine").write_text("a")
    with pytest.raises(UserError, match=".idx or .* or _tokenizer is there already, made otherwise"):
        preprocess([file], tmp_path / "x", chatml, options=Options(chat=ChatOptions()))
    assert (own / "mine").read_text() == "a"


def test_cut_samples_are_counted_and_shown(chatml: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    file = lines(tmp_path / "in.jsonl", SHAREGPT, SHAREGPT)
    argv = ["prepare-chat", "--input", str(file), "--output", str(tmp_path / "x"), "--tokenizer", str(chatml),
            "--seq-length", "24", "--overflow", "truncate-left", "--max-turns", "2", "--show", "9"]  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(argv)
    out = capsys.readouterr().out
    assert "\x1b[32mSo.<|im_end|>\x1b[0m" in out
    counts = json.loads(out.splitlines()[-1])
    assert counts["documents"] == 4 and counts["lengths"]["max"] == 24 == read_preparation(tmp_path / "x").seq_length
    cut = {"conversations cut into pieces of --max-turns": 2, "samples cut at the left to --seq-length": 4}
    assert counts["dropped"] == cut and all(why in out for why in cut)
    assert all(text.endswith("<|im_end|>\n") for text in texts(tmp_path / "x"))


@pytest.mark.grid
def test_parts_and_workers_make_no_difference(chatml: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(preprocess_module, "SMALL_BYTES", 0)
    file = lines(tmp_path / "in/a.jsonl", *[SHAREGPT, ALPACA, "{", GOOD] * 40)
    (tmp_path / "in/b.json").write_text(json.dumps([ALPACA] * 60, indent=1))
    for name, workers, part_bytes in (("one", 1, None), ("many", 2, 2000)):
        options = Options(on_error="skip", part_bytes=part_bytes, chat=ChatOptions())
        made = preprocess([file.parent], tmp_path / name, chatml, workers=workers, options=options)
        assert (made.documents, made.skipped) == (180, 40)
        assert made.statistics.malformed[0]["first"].startswith(f"{file}:3 is not valid JSON")
    for end in (".bin", ".idx", "_supervised.bin", "_supervised.idx"):
        assert (tmp_path / f"one{end}").read_bytes() == (tmp_path / f"many{end}").read_bytes()


@pytest.mark.grid
def test_slurm_jobs_make_the_same_files(chatml: Path, tmp_path: Path, monkeypatch: Any) -> None:
    scripts(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    file = lines(tmp_path / "in.jsonl", *[SHAREGPT, ALPACA, GOOD] * 40)
    options = Options(part_bytes=4000, chat=ChatOptions())
    preprocess([file], tmp_path / "here", chatml, options=options)
    cluster = {"executor": "slurm", "executor_options": {"partition": "cpu", "time": "1"}}
    assert preprocess([file], tmp_path / "there", chatml, options=options, **cluster) is None
    work = WorkFolder(tmp_path / "there.partial")
    monkeypatch.setenv("SLURM_NODELIST", "node1")
    for folder, count in (("datatrove", work.count_parts()), ("datatrove-join", 1)):
        for rank in range(count):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
            dill.loads((work.path / folder / "executor.pik").read_bytes()).run()
    assert texts(tmp_path / "there") == texts(tmp_path / "here")
    assert read_preparation(tmp_path / "there").statistics == read_preparation(tmp_path / "here").statistics


def _prepare_with_little_room(bytes_a_file: int, file: Path, prefix: Path, tokenizer: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
    try:
        preprocess([file], prefix, tokenizer, options=Options(part_bytes=30_000, chat=ChatOptions()))
    except UserError as error:
        os._exit(7 if "cannot write" in str(error) else 1)
    os._exit(0)


def test_no_room_leaves_nothing_under_a_final_name(chatml: Path, tmp_path: Path) -> None:
    """The tokenizer fits, and each part, but not what they are joined into."""
    file = lines(tmp_path / "in.jsonl", *[SHAREGPT] * 600)
    child = multiprocessing.get_context("fork").Process(
        target=_prepare_with_little_room, args=(40_000, file, tmp_path / "out/x", chatml)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert {each.name for each in (tmp_path / "out").iterdir()} <= {"x.partial"}
