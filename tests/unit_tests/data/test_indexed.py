import struct

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_recursive.data.indexed import check_indexed_dataset, largest_sampled_id, token_type, write_index
from megatron_recursive.errors import UserError


@pytest.fixture
def copy(tmp_path):
    """A dataset of three documents."""
    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=numpy.uint16)
    for ids in ([5, 6, 7], [8], [9, 10]):
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "train.idx"))
    return tmp_path / "train"


def damage(change):
    def apply(prefix):
        file, edit = change
        path = prefix.with_suffix(file)
        path.write_bytes(edit(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda prefix: prefix.with_suffix(".bin").unlink(), "train.bin does not exist"),
        (lambda prefix: prefix.with_suffix(".idx").unlink(), "train.idx does not exist"),
        (damage((".bin", lambda raw: raw[:-2])), "train.bin has .* bytes but train.idx promises"),
        (damage((".bin", lambda raw: b"")), "train.bin has 0 bytes but train.idx promises"),
        (damage((".idx", lambda raw: raw[:-8])), "train.idx has .* bytes but its header promises"),
        (damage((".idx", lambda raw: raw[:20])), "train.idx is cut off after 20 bytes"),
        (damage((".idx", lambda raw: b"")), "train.idx is cut off after 0 bytes"),
        (damage((".idx", lambda raw: b"\x80\x04K\x01." * 20)), "train.idx is not an index"),
        (damage((".idx", lambda raw: raw[:34] + bytes(len(raw) - 34))), "train.idx is damaged"),
        (damage((".idx", lambda raw: raw[:18] + struct.pack("<QQ", 0, 1) + bytes(8))), "holds no document"),
        (lambda prefix: [prefix.with_suffix(".bin").write_bytes(b""), prefix.with_suffix(".idx").write_bytes(
            b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, 0, 0, 0, 1))], "holds no token"),
        (damage((".idx", lambda raw: raw[:18] + struct.pack("<QQ", 2**63, 2**63))), "its header promises"),
    ],
)
def test_a_half_written_dataset_is_refused(copy, break_it, said):
    check_indexed_dataset(copy)
    break_it(copy)
    with pytest.raises(UserError, match=said) as caught:
        check_indexed_dataset(copy)
    assert "\n" not in str(caught.value) and "recursive preprocess" in str(caught.value)


def test_the_largest_id_is_looked_for_at_both_ends(copy):
    assert [largest_sampled_id(copy, tokens) for tokens in (1, 3, 2**20)] == [10, 10, 10]
    copy.with_suffix(".bin").write_bytes(struct.pack("<6H", 5, 6, 700, 8, 9, 10))
    assert [largest_sampled_id(copy, tokens) for tokens in (1, 3)] == [10, 700]


def test_a_prefix_with_its_suffix_is_explained(copy):
    with pytest.raises(UserError, match="give the prefix without .bin"):
        check_indexed_dataset(f"{copy}.bin")


@pytest.mark.parametrize("documents", [0, 1, 1000])
@pytest.mark.parametrize("id_range", [65499, 65500])
def test_the_index_is_the_one_that_megatron_writes(tmp_path, documents, id_range):
    token = token_type(id_range)
    assert numpy.dtype(token) == DType.optimal_dtype(id_range)
    lengths = numpy.random.default_rng(1).integers(1, 2**20, documents)
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=DType.optimal_dtype(id_range))
    for length in lengths:
        builder.add_document([], [length])
    builder.finalize(str(tmp_path / "a.idx"))
    write_index(tmp_path / "b.idx", token, lambda: [piece for piece in numpy.split(lengths, [300, 301]) if len(piece)])
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
