"""A cache of keys and values for recursive GPTs. Ships inside an export: it imports torch and transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from .configuration_recursive_gpt import RecursiveGPTConfig


class RecursiveCache(Cache):
    """Keys and values of all passes and layers, a tensor per block, in which skipped passes cost next to nothing.

    A slot is ``layer_idx = pass * layers + layer``. Space grows by half when it is full; blocks are added when a token
    first reaches them, as copies of the block before, which is what earlier tokens owe them (exits_recursive_gpt.py).
    It serves at fixed depth too. All of it lies on one device.
    """

    def __init__(self, config: RecursiveGPTConfig, reserve: int = 64) -> None:
        super().__init__(layers=[])
        self.slots_per_block = config.num_hidden_layers // config.num_refinement_blocks
        self.length, self.reserve = 0, reserve
        self.blocks: list[Tensor] = []  # each [slots, 2, B, heads, space, D]
        self.views: list[list[tuple[Tensor, Tensor]]] = []  # of each block, by slot: keys and values
        self.filled: list[int] = []  # tokens that each block holds

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        block, slot = divmod(layer_idx, self.slots_per_block)
        added = key_states.shape[-2]
        if layer_idx == 0:
            self.length += added  # the first slot of every forward
            self._make_room()
        if block == len(self.blocks):
            self._add_block(key_states)
        keys, values = self.views[block][slot]
        keys.narrow(2, self.length - added, added).copy_(key_states)
        values.narrow(2, self.length - added, added).copy_(value_states)
        if slot == self.slots_per_block - 1:
            self.filled[block] = self.length
        return keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)

    def _add_block(self, like: Tensor) -> None:
        batch, heads, _, size = like.shape
        if self.blocks:
            added, filled = self.blocks[-1].clone(), self.filled[-1]
        else:
            space = max(self.reserve, self.length)
            added, filled = like.new_zeros(self.slots_per_block, 2, batch, heads, space, size), 0
        self.filled.append(filled)
        self._hold([*self.blocks, added])

    def _make_room(self) -> None:
        space = self.blocks[0].shape[-2] if self.blocks else self.length
        if self.length > space:
            more = max(self.length - space, space // 2)
            self._hold([F.pad(store, (0, 0, 0, more)) for store in self.blocks])

    def _hold(self, blocks: list[Tensor]) -> None:
        self.blocks = blocks
        self.views = [[(slot[0], slot[1]) for slot in store] for store in blocks]

    def settle(self) -> None:
        """Tokens that have not reached a block owe it what they gave to the block before."""
        for block in range(1, len(self.blocks)):
            start = self.filled[block]
            if start < self.length:
                self.blocks[block][..., start : self.length, :] = self.blocks[block - 1][..., start : self.length, :]
                self.filled[block] = self.length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._hold([change(store) for store in self.blocks])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda store: store.index_select(2, beam_idx.to(store.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda store: store.repeat_interleave(repeats, dim=2))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda store: store[:, :, indices])

    def crop(self, tokens_to_remove: int) -> None:
        self.settle()
        self.length -= min(abs(tokens_to_remove), self.length)
        self.filled = [self.length] * len(self.blocks)

    def reset(self) -> None:
        self._hold([])
        self.filled, self.length = [], 0

    def __len__(self) -> int:
        return len(self.blocks) * self.slots_per_block

    @property
    def batch_size(self) -> int:
        return self.blocks[0].shape[2] if self.blocks else -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.blocks)
