"""Samples of a chat dataset as text, with what is supervised in another colour."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from megatron_recursive.data.joining import SUPERVISED, TOKENIZER
from megatron_recursive.data.tokenizer import load_tokenizer


def show(prefix: str, count: int) -> None:
    """Print the first samples of a dataset; without a terminal, what is supervised stands in brackets."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = load_tokenizer(Path(f"{prefix}{TOKENIZER}"))
    begin, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
    samples, masks = IndexedDataset(prefix), IndexedDataset(f"{prefix}{SUPERVISED}")
    for number in range(min(count, len(samples))):
        pieces = []
        for counted, tokens in itertools.groupby(zip(samples[number].tolist(), masks[number].tolist(), strict=True),
                                                 key=lambda pair: pair[1]):  # fmt: skip
            text = tokenizer.decode([token for token, _ in tokens]).replace("\x1b", "\\x1b")
            pieces.append(f"{begin}{text}{end}" if counted else text)
        print(f"--- sample {number}, {len(samples[number]):,} tokens\n{''.join(pieces)}")
