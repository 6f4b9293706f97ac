"""Packing: every sample once, no bin over its capacity, and bins that are full."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_recursive.data.chat.packing import pack
from megatron_recursive.errors import UserError


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 200), st.integers(0, 3))
def test_every_sample_lies_in_one_bin_and_no_two_bins_of_a_window_could_be_one(data, capacity, seed):
    lengths = data.draw(st.lists(st.integers(0, capacity), max_size=60))
    bins = pack(lengths, capacity, seed)
    assert sorted(index for each in bins for index in each) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in each) for each in bins)
    assert not filled or filled[-1] <= capacity
    assert all(a + b > capacity for a, b in zip(filled, filled[1:], strict=False)) or 0 in lengths
    assert bins == pack(np.array(lengths, np.int32), capacity, seed)


@pytest.mark.grid
def test_realistic_lengths_fill_bins_and_a_million_samples_take_seconds():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6, 0.9, 1_000_000).astype(int) + 1, 1, 4096)  # median 400, some windows are full
    begin = time.process_time()
    bins = pack(lengths, 4096, 1)
    assert time.process_time() - begin < 20
    assert lengths.sum() / (4096 * len(bins)) > 0.99
    few = lengths[:2000].tolist()
    assert sum(few) / (4096 * len(pack(few, 4096, 1))) > 0.95
    assert pack(few, 4096, 1) != pack(few, 4096, 2)


def test_a_sample_that_no_bin_holds_is_named():
    with pytest.raises(UserError, match="Sample 1 has 9 tokens, which --seq-length 8"):
        pack([3, 9, 2], 8, 0)
