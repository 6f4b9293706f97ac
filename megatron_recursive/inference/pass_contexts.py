"""Keys and values of earlier tokens for a Megatron model whose layers run once per pass.

Megatron's StaticInferenceContext keys its memory by layer number, so that the passes of a recursion would overwrite
each other: every pass gets a context of its own, and attention stays Megatron's.
"""

from __future__ import annotations

from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor
from transformers.cache_utils import Cache


class PassContexts(Cache):
    """One inference context per pass, in the shape of a cache of transformers.

    Args:
        max_length: tokens that there is room for. passes_per_block: of the plan.
    """

    def __init__(self, max_length: int, passes_per_block: int) -> None:
        super().__init__(layers=[])
        self.max_length, self.passes_per_block = max_length, passes_per_block
        self.length = 0
        self.contexts: list[StaticInferenceContext] = []

    def ensure_passes(self, count: int, batch_size: int) -> None:
        """Have contexts for at least so many passes; called before the first token."""
        while len(self.contexts) < count:
            self.contexts.append(StaticInferenceContext(batch_size, self.max_length))

    def advance(self, tokens: int) -> None:
        """So many tokens have gone through the passes."""
        self.length += tokens
        for context in self.contexts:
            context.sequence_len_offset = self.length
            context.enable_decode_mode()

    def fill_skipped(self, blocks_B: Tensor) -> None:
        """Give the passes that a sequence skipped its keys and values of the same pass in its last block.

        That is the policy of ``hf/model/exits_recursive_gpt.py``. The last token has gone in, but not been counted.
        """
        for block in range(1, len(self.contexts) // self.passes_per_block):
            late = (blocks_B <= block).nonzero().squeeze(1)
            for number in range(self.passes_per_block if len(late) else 0):
                mine = self.contexts[block * self.passes_per_block + number].key_value_memory_dict
                before = self.contexts[(block - 1) * self.passes_per_block + number].key_value_memory_dict
                for layer, stores in before.items():
                    if layer not in mine:  # nobody has reached this block yet
                        mine[layer] = tuple(store.clone() for store in stores)
                    for target, source in zip(mine[layer], stores, strict=True):
                        target[self.length, late] = source[self.length, late]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for context in self.contexts:
            if context.key_value_memory_dict:
                context.swap_key_value_dict(beam_idx)

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def is_initialized(self) -> bool:
        return bool(self.contexts)
