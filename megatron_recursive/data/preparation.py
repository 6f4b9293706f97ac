"""What a dataset was made of, in ``PREFIX.idx.json`` beside it: the tokenizer's vocabulary and the input.

Token ids mean nothing without their tokenizer, and an ``.idx`` does not tell which one it was. Whoever reads the ids
compares. A dataset of Megatron's own script has no such file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError


@dataclass(frozen=True)
class Preparation:
    """The record of a dataset.

    Attributes:
        vocab_size: token ids are below it.
        vocabulary: :func:`vocabulary_digest` of the tokenizer, up to ``vocab_size``.
        tokenizer: what the user called the tokenizer, for people only.
        source: digest of the inputs (names, sizes, times), the tokenizer and the options that the tokens depend on.
        documents, tokens, skipped: as the preparation counted them.
        bin_bytes: size of the ``.bin``, by which a record that another program's files have outlived is known.
    """

    vocab_size: int
    vocabulary: str
    tokenizer: str
    source: str
    documents: int
    tokens: int
    skipped: int
    bin_bytes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def preparation_file(prefix: str | Path) -> Path:
    """Where the record of a dataset lies."""
    return Path(f"{prefix}.idx.json")


def read_preparation(prefix: str | Path) -> Preparation | None:
    """The record of a dataset, or None where it has none, or one of other files.

    Raises:
        UserError: the record is not one.
    """
    file = preparation_file(prefix)
    if "://" in str(prefix) or not file.is_file():
        return None
    try:
        made = Preparation(**json.loads(file.read_text("utf-8")))
        if type(made.vocab_size) is not int or not isinstance(made.vocabulary, str):
            raise ValueError("vocab_size must be a number and vocabulary a text")
        return made if made.bin_bytes == Path(f"{prefix}.bin").stat().st_size else None
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{file} cannot be read ({reason}); delete it, and the dataset is read unchecked") from error


def vocabulary_digest(vocabulary: Mapping[str, int], below: int) -> str:
    """SHA-256 of which token each id below a bound stands for; tokens added behind it make no difference."""
    tokens = sorted((number, token) for token, number in vocabulary.items() if number < below)
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def source_digest(key: Mapping[str, Any]) -> str:
    """SHA-256 of what a dataset depends on."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
