"""A held-out set of which every evaluation reads the same samples.

Megatron's iterator goes on from where the evaluation before ended, so that losses at different iterations, and those of
runs of different length, are of different samples.
"""

from __future__ import annotations

from typing import Any


class SameSamples:
    """The first ``period`` samples of a dataset, over and over; a shorter one begins again within an evaluation."""

    def __init__(self, dataset: Any, period: int, length: int) -> None:
        self.dataset, self.period, self.length, self.size = dataset, period, length, len(dataset)
        self.index_split = getattr(dataset, "index_split", None) or dataset.split  # the sampler's batch goes by it

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % self.period % self.size]
