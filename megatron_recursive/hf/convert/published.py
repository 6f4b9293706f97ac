"""What is said of a model type that is recursive in itself: how its config and its files say what a plan does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.plan import RecursionConfig


@dataclass(frozen=True)
class OwnRecursion:
    """Of one model type.

    Attributes:
        shape: fields of an architecture that its config calls otherwise than the table says.
        knobs: of its recursion, from its config and the name that an error gives it.
        expresses: whether its class computes such a recursion.
        config: what its config.json says of one.
        stored: what its class calls a parameter, to the tensor of its files, and which of how many equal parts it is.
        layer: what the names of a layer's tensors begin with, by its number and that of all.
        notes: what there is to be warned of.
    """

    shape: Callable[[Any], dict[str, Any]]
    knobs: Callable[[Any, str], dict[str, Any]]
    expresses: Callable[[RecursionConfig], bool]
    config: Callable[[Architecture, RecursionConfig], dict[str, Any]]
    stored: Callable[[str], tuple[str, int, int]]
    layer: Callable[[int, int], str]
    notes: Callable[[Any], list[str]]

    def recursion(self, config: Any, where: str) -> RecursionConfig:
        """Resolved."""
        return RecursionConfig(**self.knobs(config, where)).resolved(embedding_init_std=1.0)

    def parameters(self, fetch: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """Parameters by the names of its class; ``fetch`` knows those of its files."""
        held: dict[str, Tensor] = {}

        def part(name: str) -> Tensor:
            whole, at, parts = self.stored(name)
            if whole not in held:
                held.clear()  # its parts are asked for one after another
                held[whole] = fetch(whole)
            return held[whole].chunk(parts)[at] if parts > 1 else held.pop(whole)

        return part
