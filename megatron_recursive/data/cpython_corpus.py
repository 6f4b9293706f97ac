"""A small corpus of English prose that every CPython carries: its language reference and its docstrings.

It needs no network and no licence beyond Python's own (the PSF licence). The text depends on the Python version only.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_recursive.data.files import replacing
from megatron_recursive.errors import UserError

VALID_FRACTION = 0.05
MIN_CHARACTERS = 200
"""Shorter documents (a module with a one-line docstring) teach little and are left out."""
MIN_PROSE_WORDS = 3
"""A docstring with fewer words outside its doctest examples is left out."""

# Tests are left out because many distributions do not carry them.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_PROSE_FILES = ("LICENSE.txt", "idlelib/HISTORY.txt", "idlelib/NEWS.txt", "idlelib/NEWS2x.txt", "idlelib/README.txt",
                "idlelib/TODO.txt", "idlelib/extend.txt")  # fmt: skip
_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class CorpusDocument:
    """One document; ``id`` is stable over runs and machines, such as ``modules/asyncio.events``."""

    id: str
    text: str


@dataclass(frozen=True)
class CorpusSummary:
    """What :func:`write_cpython_corpus` wrote: documents and characters of each split, and their Python's version."""

    train_file: Path
    valid_file: Path
    train_documents: int
    train_characters: int
    valid_documents: int
    valid_characters: int
    python_version: str


def write_cpython_corpus(output: str | Path) -> CorpusSummary:
    """Write ``train.jsonl`` and ``valid.jsonl`` (keys ``text`` and ``id``) into the folder ``output``.

    Raises:
        UserError: this Python carries no source files, or the folder cannot be written.
    """
    output = Path(output)
    splits: dict[bool, list[CorpusDocument]] = {False: [], True: []}
    for document in cpython_documents():
        splits[is_held_out(document.id)].append(document)
    targets = [output / "train.jsonl", output / "valid.jsonl"]
    with replacing(*targets) as partials:
        for partial, held_out in zip(partials, (False, True), strict=True):
            with open(partial, "w", encoding="utf-8", newline="\n") as stream:
                for document in splits[held_out]:
                    record = {"text": document.text, "id": document.id}
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    train, valid = splits[False], splits[True]
    return CorpusSummary(
        train_file=targets[0],
        valid_file=targets[1],
        train_documents=len(train),
        train_characters=sum(len(d.text) for d in train),
        valid_documents=len(valid),
        valid_characters=sum(len(d.text) for d in valid),
        python_version=platform.python_version(),
    )


def is_held_out(document_id: str) -> bool:
    """Whether a document belongs to the held-out split: about ``VALID_FRACTION`` of all ids, by their SHA-256."""
    digest = hashlib.sha256(document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALID_FRACTION * 2**64


def cpython_documents() -> list[CorpusDocument]:
    """All documents of this Python's corpus, in a fixed order.

    Raises:
        UserError: the standard library's sources or ``pydoc_data`` are not on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [*_topics(), *_modules(root), *_prose_files(root)]
    if not any(document.id.startswith("modules/") for document in documents):
        raise UserError(f"no Python sources under {root}; run with a Python that carries its standard library as files")
    return documents


def _topics() -> Iterator[CorpusDocument]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python has no pydoc_data; install the full standard library or use another") from error
    # "while" is a part of "compound", "naming" nearly all of "execmodel": as documents of their own, the two could fall
    # into different splits. The longer one stays.
    seen: set[str] = set()
    kept: list[str] = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [" ".join(paragraph.split()) for paragraph in topics[name].split("\n\n")]
        repeated = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if repeated <= 0.5 * sum(map(len, paragraphs)):
            kept.append(name)
            seen.update(paragraphs)
    for name in sorted(kept):
        text = _clean(topics[name])
        if len(text) >= MIN_CHARACTERS:
            yield CorpusDocument(f"topics/{name}", text)


def _modules(root: Path) -> Iterator[CorpusDocument]:
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        parts = [f"{heading}\n\n{docstring}" for heading, docstring in _docstrings(tree, name, seen)]
        text = "\n\n".join(parts)
        if len(text) >= MIN_CHARACTERS:
            yield CorpusDocument(f"modules/{name}", text)


def _docstrings(scope: _Scope, name: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (heading, docstring) of a module, class or function and of all within it, in the order of the source."""
    docstring = _clean(ast.get_docstring(scope) or "")
    key = " ".join(docstring.split())
    if key not in seen and _has_prose(docstring):
        seen.add(key)
        yield name, docstring
    for node in scope.body:
        if isinstance(node, _Scope):
            # A function's inner functions are named as if they stood beside it; a module's own name is left out.
            yield from _docstrings(node, node.name if isinstance(scope, ast.Module) else f"{name}.{node.name}", seen)


def _prose_files(root: Path) -> Iterator[CorpusDocument]:
    for relative in _PROSE_FILES:
        if (root / relative).is_file():
            yield CorpusDocument(f"texts/{relative}", _clean((root / relative).read_text("utf-8", errors="replace")))


def _clean(text: str) -> str:
    text = re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]|[\ud800-\udfff]", "", text.expandtabs())
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _has_prose(docstring: str) -> bool:
    # A doctest example runs from its prompt to the next blank line.
    prose = re.sub(r"^[ ]*>>>.*(?:\n[ ]*\S.*)*", "", docstring, flags=re.MULTILINE)
    return len(re.findall(r"[A-Za-z]{2,}", prose)) >= MIN_PROSE_WORDS
