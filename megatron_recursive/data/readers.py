"""Documents of ``.txt`` and ``.jsonl`` files, and of folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_recursive.errors import UserError

SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Document:
    """One document: its text, and the bytes it took on disk (for progress)."""

    text: str
    size: int


def find_input_files(paths: Sequence[str | Path]) -> list[Path]:
    """Expand folders (recursively, in name order) into the ``.txt`` and ``.jsonl`` files below them.

    Raises:
        UserError: a path is missing, a file has another suffix, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not found:
                raise UserError(f"--input {path} holds no .txt or .jsonl file; name a folder or file that does")
            files += found
        elif not path.exists():
            raise UserError(f"--input {path} does not exist; name a .txt or .jsonl file, or a folder of them")
        elif path.suffix not in SUFFIXES:
            raise UserError(f"--input {path} is neither .txt nor .jsonl; convert or rename it")
        else:
            files.append(path)
    return files


def total_bytes(files: Sequence[Path]) -> int:
    """Size of the files together, in bytes."""
    return sum(file.stat().st_size for file in files)


def iter_documents(files: Sequence[Path], json_key: str = "text") -> Iterator[Document]:
    """Yield the documents of the files in order: a ``.txt`` file is one document, a ``.jsonl`` line another.

    Documents of white space only are left out.

    Raises:
        UserError: a file cannot be read, is not UTF-8, or has a line that is no JSON object with a string under
            ``json_key``; the message names file and line.
    """
    for file in files:
        try:
            documents = _read_jsonl(file, json_key) if file.suffix == ".jsonl" else _read_txt(file)
            yield from (document for document in documents if document.text.strip())
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror}); mend its permissions or leave it out") from error


def _read_txt(file: Path) -> Iterator[Document]:
    raw = file.read_bytes()
    try:
        yield Document(raw.decode("utf-8-sig"), len(raw))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); convert it or leave it out") from error


def _read_jsonl(file: Path, json_key: str) -> Iterator[Document]:
    with open(file, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if raw.strip():
                yield Document(_text_of_line(raw, json_key, f"{file}:{number}"), len(raw))


def _text_of_line(raw: bytes, json_key: str, where: str) -> str:
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8; convert the file or remove the line") from error
    # RecursionError: thousands of nested brackets, which json refuses in this way.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); mend or remove the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; write each document as {{{json.dumps(json_key)}: ...}}")
    if json_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise UserError(f"{where} has no key {json_key!r} (its keys: {keys}); name the text's key with --json-key")
    text = record[json_key]
    if not isinstance(text, str):
        raise UserError(f"{where} has a {type(text).__name__} under {json_key!r}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # json accepts "\ud800"; a tokenizer does not
        raise UserError(f"{where} has half a surrogate pair under {json_key!r}; mend or remove the line") from error
    return text
