"""What ``--split`` sets apart: where its parts begin, and which documents a model was not trained on."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError

SPLITS = ("train", "valid", "test")
MEGATRONS_SPLIT = "969,30,1"  # what validate_args takes where --data-path is given without --split


def split_bounds(split: str, documents: int) -> list[int]:
    """Where the parts of --split begin and end, as Megatron rounds: at most four numbers of documents."""
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        parts = []
    if not parts or min(parts) < 0 or not parts[0] or math.isinf(sum(parts)) or len(parts) > len(SPLITS):
        raise UserError(f"--split {split} must be up to three numbers, train, valid and test, the first above 0.")
    parts += [0.0] * (len(SPLITS) - len(parts))
    return [round(documents * sum(parts[:i]) / sum(parts)) for i in range(len(parts) + 1)]


def unread_documents(prefix: str, documents: int, trained: Mapping[str, Any], model: str) -> range:
    """Of a dataset with so many, those that a model was not trained on, by the arguments ``trained`` of its checkpoint.

    Where they name the prefix, those that --split holds out for validation; stderr tells that, or that there are none.
    Otherwise all, and of training text too.
    """
    file, whole = Path(f"{prefix}.idx").resolve(), range(documents)
    given = {name: trained.get(name) or [] for name in ("data_path", "chat_data", "train_data_path")}
    named = [name for name, said in given.items() for each in ([said] if isinstance(said, str) else said)
             if Path(f"{each}.idx").resolve() == file]  # fmt: skip
    if not named:
        return whole
    apart = named[0] == "train_data_path" or trained.get("valid_chat_data")  # what is held out lies elsewhere
    split = "1" if apart else (trained.get("split") or MEGATRONS_SPLIT).replace(" ", "")
    _, first, last, _ = split_bounds(split, documents)
    if first == last:
        print(f"WARNING: {model} was trained on {prefix}, and nothing of it was held out for validation: this measures "
              "training text.", file=sys.stderr)  # fmt: skip
        return whole
    print(f"{model} was trained on {prefix}: of its {documents:,} documents those are read that --split {split} held "
          f"out for validation, {last - first:,}.", file=sys.stderr)  # fmt: skip
    return range(first, last)
