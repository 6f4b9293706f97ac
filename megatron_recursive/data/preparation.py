"""What a dataset was made of, in ``PREFIX.idx.json`` beside it: the tokenizer's vocabulary and the input.

Token ids mean nothing without their tokenizer, and an ``.idx`` does not tell which one it was. Whoever reads the ids
compares. A dataset of Megatron's own script has no such file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError

SUFFIX = ".idx.json"


@dataclass(frozen=True)
class Preparation:
    """The record of a dataset: ids are below ``vocab_size``; ``vocabulary`` is their tokens' :func:`vocabulary_digest`.

    ``tokenizer`` is what the user called it, for people only; ``source`` the :func:`digest` of all that the tokens
    depend on; by ``bin_bytes``, the size of the ``.bin``, a record that another program's files have outlived is known.
    ``special_tokens``: each document has those that the tokenizer puts around a text. ``revisions``: the data sets of
    the Hugging Face hub among the input, with their commits. ``kind``: ``text``, or ``chat``, beside which a dataset
    ``PREFIX_supervised`` says which tokens the loss counts; ``supervised_tokens`` is their sum, ``seq_length`` how long
    its documents may be (None: as they are). ``statistics`` is a dict of :class:`~..statistics.Statistics`.
    """

    vocab_size: int
    vocabulary: str
    tokenizer: str
    source: str
    documents: int
    tokens: int
    skipped: int
    bin_bytes: int
    special_tokens: bool = False
    revisions: list[str] = field(default_factory=list)
    kind: str = "text"
    supervised_tokens: int | None = None
    seq_length: int | None = None
    statistics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read_preparation(prefix: str | Path) -> Preparation | None:
    """The record of a dataset, or None where it has none, or one of other files.

    Raises:
        UserError: the record is not one.
    """
    file = Path(f"{prefix}{SUFFIX}")
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
    """Which token each id below a bound stands for, in short; tokens added behind it make no difference."""
    return digest(sorted((number, token) for token, number in vocabulary.items() if number < below))


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
