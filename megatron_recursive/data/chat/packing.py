"""Packing: which samples share a sequence of fixed length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from megatron_recursive.errors import UserError

_WINDOW = 16_384  # samples placed together: enough to fill bins, few enough that other seeds give other neighbours


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Put every sample into a bin, best fit decreasing within windows of shuffled samples.

    Deterministic; another seed (of another epoch) gives each sample other neighbours. In time
    O(n log capacity), but for moving at most ``capacity`` integers of a sorted list per sample.

    Returns:
        The indices of the samples in each bin, whose lengths sum to at most ``capacity``; the bins are in shuffled
        order.

    Raises:
        UserError: a sample is longer than ``capacity``.
    """
    length_N = np.asarray(lengths, np.int64)
    if (length_N > capacity).any():
        longest = int(length_N.argmax())
        raise UserError(
            f"Sample {longest} has {length_N[longest]} tokens, which --seq-length {capacity} cannot hold; raise it, or "
            "prepare the data for this length."
        )
    random = np.random.default_rng(seed)
    order_N = random.permutation(len(length_N))
    bins: list[list[int]] = []
    for start in range(0, len(order_N), _WINDOW):
        window = order_N[start : start + _WINDOW]
        decreasing = window[np.argsort(-length_N[window], kind="stable")]
        rooms: list[int] = []  # every free room that an open bin has, ascending
        open_bins: dict[int, list[int]] = {}  # the bins with that room
        for index, length in zip(decreasing.tolist(), length_N[decreasing].tolist(), strict=True):
            at = bisect_left(rooms, length)
            if at == len(rooms):
                place, room = len(bins), capacity
                bins.append([])
            else:
                room = rooms[at]
                place = open_bins[room].pop()
                if not open_bins[room]:
                    del rooms[at]
            bins[place].append(index)
            left = room - length
            if left:
                if not open_bins.setdefault(left, []):
                    insort(rooms, left)
                open_bins[left].append(place)
    return [bins[each] for each in random.permutation(len(bins))]
