import bz2
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_recursive.data import readers, sources
from megatron_recursive.data.readers import iter_documents, read_span
from megatron_recursive.data.sources import find_files, plan_parts, total_bytes
from megatron_recursive.errors import UserError


def texts(*paths, json_key="text"):
    return [document.text for document in iter_documents(find_files(paths), json_key)]


def texts_by_parts(part_bytes, *paths):
    parts = plan_parts(find_files(paths), part_bytes)
    return len(parts), [document.text for part in parts for span in part for document in read_span(span)]


def jsonl(*documents):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents)


def write_parquet(file, values, rows=3, key="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(values))), key: values}), file, row_group_size=rows)


def test_folders_are_read_in_name_order_and_blank_documents_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": " \\n"}\n{"text": "zwei ü"}', "utf-8")
    (tmp_path / "a.txt").write_text("whole\n\nfile\n", "utf-8-sig")
    (tmp_path / "sub" / "c.txt").write_text("below", "utf-8")
    (tmp_path / "b.jsonl.partial-7").write_text("half", "utf-8")
    (tmp_path / "notes.md").write_text("not read", "utf-8")
    for name in ("tokenizer.json", "sub/b.idx.json"):  # beside the data by custom
        (tmp_path / name).write_text("{", "utf-8")
    assert texts(tmp_path) == ["whole\n\nfile\n", "one", "zwei ü", "below"]
    assert texts(tmp_path / "sub", tmp_path / "a.txt") == ["below", "whole\n\nfile\n"]


def test_capitals_in_an_ending_make_no_difference(tmp_path):
    (tmp_path / "A.JSONL").write_bytes(jsonl("one"))
    (tmp_path / "B.Txt.GZ").write_bytes(gzip.compress(b"two"))
    write_parquet(tmp_path / "C.PARQUET", ["three"])
    assert texts(tmp_path) == texts(*sorted(tmp_path.iterdir())) == ["one", "two", "three"]
    assert texts_by_parts(1, tmp_path)[1] == ["one", "two", "three"]


def test_all_formats_give_the_same_documents(tmp_path):
    documents = [f"document {n} ü" for n in range(10)]
    raw = jsonl(*documents)
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw[:40]) + gzip.compress(raw[40:]))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(pack(raw[:100]) + pack(raw[100:]))  # two frames, cut within a line
    write_parquet(tmp_path / "d.parquet", documents)
    (tmp_path / "d2.jsonl.bz2").write_bytes(bz2.compress(raw[:50]) + bz2.compress(raw[50:]))
    (tmp_path / "d3.json").write_bytes(raw)
    (tmp_path / "d4.json.gz").write_bytes(gzip.compress(raw))
    assert texts(tmp_path) == documents * 7
    (tmp_path / "d.idx.json").write_text("{")
    assert texts(str(tmp_path / "d*.js*")) == documents * 3
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"packed text\n"))
    (tmp_path / "f.txt.zst").write_bytes(pack(b"packed text\n"))
    assert texts(tmp_path / "e.txt.gz", tmp_path / "f.txt.zst") == ["packed text\n"] * 2


@pytest.mark.parametrize("part_bytes", [1, 7, 60, 61, 62, 63, 200, 10**6])
def test_byte_ranges_cut_at_line_ends_lose_and_repeat_nothing(tmp_path, part_bytes):
    documents = [f"{n} " + "x" * (n * 7 % 50) for n in range(40)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(*documents[:20]) + b"\n\n" + jsonl(*documents[20:39]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(documents[39])[:-1])
    parts, read = texts_by_parts(part_bytes, tmp_path)
    assert read == documents
    assert parts == 1 if part_bytes == 10**6 else parts > 5


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_row_groups_of_a_table_are_read_apart(tmp_path, rows):
    documents = [f"document {n}" for n in range(10)]
    write_parquet(tmp_path / "a.parquet", documents, rows)
    assert texts_by_parts(1, tmp_path) == (-(-10 // rows), documents)


def test_a_long_text_file_becomes_documents_that_end_with_lines(tmp_path, monkeypatch):
    for module in (readers, sources):
        monkeypatch.setattr(module, "TEXT_DOCUMENT_BYTES", 100)
    lines = [f"line {n} " + "y" * (n % 30) + "\n" for n in range(60)] + ["z" * 450 + "\n", "end"]
    (tmp_path / "a.txt").write_text("".join(lines))
    _, whole = texts_by_parts(10**6, tmp_path)
    assert "".join(whole) == "".join(lines) and len(whole) > 5
    assert all(document.endswith("\n") for document in whole[:-1])
    for part_bytes in (1, 130, 250):
        parts, read = texts_by_parts(part_bytes, tmp_path)
        assert read == whole and parts > 3
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("".join(lines).encode()))
    assert texts(tmp_path / "b.txt.gz") == whole


def test_progress_sizes_add_up_to_the_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "ü"}\n{"body": "x", "n": [1]}\n', "utf-8")
    files = find_files([tmp_path])
    assert sum(d.size for d in iter_documents(files, "body")) == total_bytes(files)


BAD_LINES = [
    (b'{"text": "cut', "is not valid JSON"),
    (b'["text"]', "is not a JSON object; write each document as {\"text\": ...}, a line each (jq -c '.[]' does it"),
    (b"[", "is not valid JSON (Expecting value: line 2 column 1 (char 2)); write a document a line, as jq"),
    (b'"text"', "is not a JSON object"),
    (b'{"body": "x", "n": 1}', "has no key 'text' (its keys: 'body', 'n'); name the text's key with --json-key"),
    (b'{"text": 3}', "has a int under 'text'"),
    (b'{"text": null}', "has a NoneType under 'text'"),
    (b'{"text": "\xff"}', "is not UTF-8"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b"[" * 100_000, "is not valid JSON"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
def test_a_malformed_line_is_named(tmp_path, line, said):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(jsonl("good") + line + b"\n" + jsonl("better"))
    with pytest.raises(UserError) as caught:
        texts(file)
    assert f"{file}:2 " in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)
    rejected = []
    assert [d.text for d in iter_documents(find_files([file]), reject=rejected.append)] == ["good", "better"]
    assert [str(error) for error in rejected] == [str(caught.value)]


def test_lines_are_numbered_within_the_whole_file(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(jsonl(*["x" * 30] * 20) + b"{\n" + jsonl("last"))
    for part_bytes in range(1, 130, 8):
        with pytest.raises(UserError, match="bad.jsonl:21 is not valid JSON"):
            texts_by_parts(part_bytes, file)


def test_lines_before_a_span_are_counted_once(tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_bytes(jsonl(*["x" * 30] * 20) + b"{\n" * 9)
    span = plan_parts(find_files([tmp_path / "bad.jsonl"]), 400)[-1][-1]
    opened, rejected = [], []
    monkeypatch.setattr(readers, "open_source", lambda path: opened.append(path) or open(path, "rb"))
    list(read_span(span, "text", rejected.append))
    assert span.start and len(rejected) == 9 and len(opened) == 2
    assert str(rejected[-1]).startswith(f"{tmp_path}/bad.jsonl:29 ")


def test_what_only_the_fast_parser_refuses_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one", "score": NaN}\n{"text": "two", "n": 1e999}\n')
    assert texts(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "json.bz2", "parquet"])
def test_a_cut_off_file_is_named_and_never_skipped(tmp_path, suffix):
    file = tmp_path / f"cut.{suffix}"
    raw = jsonl(*(f"{n} {hash(n) * 7919 % 10007}" for n in range(2000)))
    if suffix == "parquet":
        write_parquet(file, ["text"] * 50)
    else:
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstandard.ZstdCompressor().compress}
        file.write_bytes(pack[suffix.rpartition(".")[2]](raw))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=f"cut.{suffix}(:[0-9]+ cannot be read| is no readable .parquet)") as caught:
        list(iter_documents(find_files([file]), reject=lambda error: None))
    assert "\n" not in str(caught.value)


def test_tables_with_another_column_or_type_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"], key="body")
    with pytest.raises(UserError, match="a.parquet has no column 'text' .its columns: id, body.; name the text's"):
        texts(tmp_path)
    assert texts(tmp_path, json_key="body") == ["x"]
    write_parquet(tmp_path / "a.parquet", ["x"] * 4 + [None], rows=2)
    with pytest.raises(UserError, match="a.parquet: row 5 has a NoneType under 'text'"):
        texts(tmp_path)


def test_missing_and_unknown_inputs_are_refused(tmp_path):
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\xff")
    with pytest.raises(UserError, match="does not exist"):
        texts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="a.md is no .txt, .jsonl or .json .also .gz, .zst, .bz2. or .parquet file"):
        texts(tmp_path / "a.md")
    with pytest.raises(UserError, match="b.txt:2 is not UTF-8"):
        texts(tmp_path / "b.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no .txt, .jsonl or"):
        texts(tmp_path / "empty")


def test_urls_are_read_through_fsspec(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/sub/b.jsonl", jsonl("two", "three"))
    memory.pipe("/corpus/a.txt", b"one\n")
    memory.pipe("/corpus/README.md", b"no text")
    files = find_files(["memory://corpus"])
    assert [(file.path, file.size) for file in files] == [
        ("memory:///corpus/a.txt", 4),
        ("memory:///corpus/sub/b.jsonl", len(jsonl("two", "three"))),
    ]
    assert texts("memory://corpus") == ["one\n", "two", "three"]
    assert texts("memory://corpus/sub/b.jsonl") == ["two", "three"]
    assert texts_by_parts(5, "memory://corpus")[1] == ["one\n", "two", "three"]
    with pytest.raises(UserError, match="memory://none cannot be listed|memory://none holds no"):
        texts("memory://none")


def test_a_hub_that_is_out_of_reach_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf://someone/corpus cannot be read .*check the name and the") as caught:
        find_files(["hf://someone/corpus"])
    assert "\n" not in str(caught.value)
