import json

import pytest

from megatron_recursive.data.readers import find_input_files, iter_documents, total_bytes
from megatron_recursive.errors import UserError


def texts(*paths, json_key="text"):
    return [document.text for document in iter_documents(find_input_files(paths), json_key)]


def test_folders_are_read_in_name_order_and_blank_documents_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": " \\n"}\n{"text": "zwei ü"}', "utf-8")
    (tmp_path / "a.txt").write_text("whole\n\nfile\n", "utf-8-sig")
    (tmp_path / "sub" / "c.txt").write_text("below", "utf-8")
    (tmp_path / "b.jsonl.partial-7").write_text("half", "utf-8")
    (tmp_path / "notes.md").write_text("not read", "utf-8")
    assert texts(tmp_path) == ["whole\n\nfile\n", "one", "zwei ü", "below"]
    assert texts(tmp_path / "sub", tmp_path / "a.txt") == ["below", "whole\n\nfile\n"]


def test_progress_sizes_add_up_to_the_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "ü"}\n{"body": "x", "n": [1]}\n', "utf-8")
    files = find_input_files([tmp_path])
    assert sum(d.size for d in iter_documents(files, "body")) == total_bytes(files)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "cut', "is not valid JSON"),
        (b'["text"]', "is not a JSON object"),
        (b'{"body": "x", "n": 1}', "has no key 'text' (its keys: 'body', 'n'); name the text's key with --json-key"),
        (b'{"text": 3}', "has a int under 'text'"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, said):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(json.dumps({"text": "good"}).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        texts(file)
    assert f"{file}:2 " in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_unknown_inputs_are_refused(tmp_path):
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="does not exist"):
        texts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="neither .txt nor .jsonl"):
        texts(tmp_path / "a.md")
    with pytest.raises(UserError, match="not UTF-8 .byte 0"):
        texts(tmp_path / "b.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no .txt or .jsonl file"):
        texts(tmp_path / "empty")
