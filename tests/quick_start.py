"""What a training run of Megatron's spends most of a second on before its first step, done away with in a test process.

Its parser reads the source of all its configs for the help of their flags, and its mock data are 100,000 documents,
whose samples are shuffled three times.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

FEW, ALL = 300, 100_000
"""Documents of mock data: a third of a million tokens, and as many as a real command has (which draws others)."""


def start_quickly(mock_documents: int = FEW) -> None:
    """Before a run in this process. A second call changes the mock data alone."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.training.argument_utils import ArgumentGroupFactory

    MockGPTLowLevelDataset.size = mock_documents
    original, read = ArgumentGroupFactory._get_field_docstrings, {}
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def once(self: Any, config: type) -> dict[str, str]:
        if config not in read:
            read[config] = original(self, config)
        return dict(read[config])

    ArgumentGroupFactory._get_field_docstrings = once
