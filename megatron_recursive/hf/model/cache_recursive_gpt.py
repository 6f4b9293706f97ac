"""A cache of keys and values for recursive GPTs. Ships inside an export: it imports torch and transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

if TYPE_CHECKING:
    from .configuration_recursive_gpt import RecursiveGPTConfig


def check_filled(cache: Cache | None, layers: int, *, whole: bool = False) -> None:
    """Refuse a cache in which earlier tokens went through other layers than these: fewer, of transformers' own.

    ``whole``: more are others too, since what stands behind a core lies elsewhere at another depth.
    """
    if torch.compiler.is_compiling():
        return
    if whole and isinstance(cache, RecursiveCache) and cache.length and cache.layers_per_block != layers:
        raise ValueError("This cache was filled at another depth; start with a new one.")
    if not isinstance(cache, DynamicCache):
        return
    first, last = cache.get_seq_length(), cache.get_seq_length(layers - 1)
    if whole and first and (last < first or cache.get_seq_length(layers)):
        raise ValueError("This cache was filled at another depth; start with a new one.")
    if last < first:
        raise ValueError(
            f"This cache was filled at a smaller depth: {last} of its {first} tokens are in the last layer; start with "
            "a new one, or with a RecursiveCache."
        )


class RecursiveCache(Cache):
    """Keys and values of all passes and layers, a tensor per block, in which skipped passes cost nothing.

    A cache layer is ``layer_idx = pass * layers + layer``. A block is added, grows by half when it is full, and takes
    over what earlier tokens computed in the block before instead (exits_recursive_gpt.py) when a token reaches it, one
    block after the other: beside what is held, growing needs room for one block. All of it lies on one device.
    It serves at fixed depth too.
    """

    max_cache_len = -1  # none; PEFT's prefix tuning asks

    def __init__(self, config: RecursiveGPTConfig, reserve: int = 64) -> None:
        super().__init__(layers=[])
        self.layers_per_block = config.layers_per_block
        self.length, self.reserve = 0, reserve
        self.blocks: list[Tensor] = []  # each [layers, 2, B, heads, space, D]
        self.views: list[list[tuple[Tensor, Tensor]]] = []  # of each block, by layer: keys and values
        self.filled: list[int] = []  # of each block: the first so many tokens are in it

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        block, layer = divmod(layer_idx, self.layers_per_block)
        added = key_states.shape[-2]
        if layer_idx == 0:
            self.length += added  # the first layer of every forward
        if layer == 0:
            self._reach(block, key_states)
        keys, values = self.views[block][layer]
        keys.narrow(2, self.length - added, added).copy_(key_states)
        values.narrow(2, self.length - added, added).copy_(value_states)
        if layer == self.layers_per_block - 1:
            self.filled[block] = self.length
        return keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)

    def _reach(self, block: int, like: Tensor) -> None:
        """Have room for the new tokens in this block, and in it the earlier tokens that did not reach it."""
        if block == len(self.blocks):
            batch, heads, _, size = like.shape
            space = max(self.reserve, self.length, self.blocks[-1].shape[-2] if self.blocks else 0)
            self.filled.append(0)
            self._set(block, like.new_zeros(self.layers_per_block, 2, batch, heads, space, size))
        elif self.length > (space := self.blocks[block].shape[-2]):
            self._set(block, F.pad(self.blocks[block], (0, 0, 0, max(self.length - space, space // 2))))
        start, stop = self.filled[block], self.length - like.shape[-2]
        if start < stop:
            self.blocks[block][..., start:stop, :] = self.blocks[block - 1][..., start:stop, :]

    def _set(self, block: int, store: Tensor) -> None:
        self.blocks[block : block + 1] = [store]
        self.views[block : block + 1] = [[(layer[0], layer[1]) for layer in store]]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for block, store in enumerate(self.blocks):
            self._set(block, change(store))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda store: store.index_select(2, beam_idx.to(store.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda store: store.repeat_interleave(repeats, dim=2))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda store: store[:, :, indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) removes nothing; give a negative number, of tokens to remove.")
        self.length -= min(-tokens_to_remove, self.length)
        self.filled = [min(filled, self.length) for filled in self.filled]

    def reset(self) -> None:
        self.blocks, self.views, self.filled, self.length = [], [], [], 0

    def __len__(self) -> int:
        return len(self.blocks) * self.layers_per_block

    @property
    def batch_size(self) -> int:
        return self.blocks[0].shape[2] if self.blocks else -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.blocks)
