"""Small conversations on disk, by the rules of the format, for tests of what reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_recursive.data.indexed import write_index

END = 125  # ends an answer; ids are below 127, the vocabulary of the tests' runs


def write_chat(prefix: Path, lengths: Sequence[int], *, seed: int = 0) -> int:
    """Samples of random ids: a question that is not supervised, an answer that is. Returns the supervised tokens.

    The first token of sample n is n (modulo 100).
    """
    draw, tokens, supervised = random.Random(seed), list[list[int]](), list[list[int]]()
    for number, length in enumerate(lengths):
        answer = draw.randint(1, length - 2) if length > 3 else 1
        ids = [number % 100, *(draw.randrange(100) for _ in range(length - 2)), END]
        tokens.append(ids)
        supervised.append([0] * (length - answer) + [1] * answer)
    for suffix, kind, values in (("", "u2", tokens), ("_supervised", "u1", supervised)):
        np.concatenate([np.asarray(each, kind) for each in values]).tofile(f"{prefix}{suffix}.bin")
        write_index(Path(f"{prefix}{suffix}.idx"), kind, lambda: [np.asarray(lengths, "i4")])
    return sum(map(sum, supervised))

