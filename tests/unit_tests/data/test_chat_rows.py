"""Conversations in rows: every sample once an epoch, apart from each other, the same at an index whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chat_data import END, write_chat

LENGTHS = [5, 9, 3, 17, 2, 8, 11, 4, 16, 7, 6, 13]
SEQ = 16


def rows_of(prefix: Path, **more: Any) -> Any:
    from megatron.core.datasets.utils import Split

    from megatron_recursive.data.chat.dataset import ChatRows, chat_lengths

    given = {"documents": (0, len(LENGTHS)), "seq_length": SEQ, "seed": 3, "split": Split.train, "samples": 40, **more}
    return ChatRows(str(prefix), chat_lengths(str(prefix)), **given)


def test_rows_hold_every_sample_once_an_epoch_and_keep_them_apart(tmp_path: Path) -> None:
    supervised = write_chat(tmp_path / "chat", LENGTHS)
    rows = rows_of(tmp_path / "chat", epochs=2)
    orders = []
    for epoch in range(2):
        at = range(epoch * rows.rows, (epoch + 1) * rows.rows)
        read = [rows.samples_at(index) for index in at]
        assert sorted(sample for samples in read for sample in samples) == list(range(len(LENGTHS)))
        orders.append(read)
        assert sum(rows[index]["loss_mask"].sum() for index in at) == supervised
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    for index, samples in enumerate(orders[0]):
        row, start = rows[index], 0
        assert {name: value.shape for name, value in row.items()} == dict.fromkeys(row, (SEQ,))
        for number, sample in enumerate(samples):
            here, size = slice(start, start + LENGTHS[sample] - 1), LENGTHS[sample] - 1
            start = here.stop
            assert row["tokens"][here][0] == sample and row["labels"][here][-1] == END
            assert np.array_equal(row["tokens"][here][1:], row["labels"][here][:-1])
            assert np.array_equal(row["position_ids"][here], np.arange(size))
            assert set(row["document_ids"][here]) == {number}
            assert row["loss_mask"][here][-1] == 1 and np.all(np.diff(row["loss_mask"][here]) >= 0)
        assert not row["loss_mask"][start:].any() and set(row["document_ids"][start:]) <= {len(samples)}
    again = rows_of(tmp_path / "chat", epochs=2)  # asked in another order, as a resumed run does
    for index in reversed(range(len(rows))):
        assert again.samples_at(index) == rows.samples_at(index)
    assert rows.samples_at(2 * rows.rows) == [] and not rows[2 * rows.rows]["loss_mask"].any()
    assert rows_of(tmp_path / "chat", seed=4).samples_at(0) != rows.samples_at(0)
    assert 0.8 < rows.fill <= 1


def test_every_evaluation_reads_the_same_held_out_rows(tmp_path: Path) -> None:
    """All of them, filled up, or the first of them: else the lowest loss is that of the easiest rows."""
    from megatron.core.datasets.utils import Split

    write_chat(tmp_path / "chat", LENGTHS)
    some = rows_of(tmp_path / "chat", split=Split.valid, documents=(0, 12), evaluation=4)
    assert some.rows > 4 and [some.samples_at(n) for n in range(4)] == [some.samples_at(n) for n in range(4, 8)]
    rows = rows_of(tmp_path / "chat", split=Split.valid, documents=(6, 12), evaluation=8)
    first, second = ([rows.samples_at(at + index) for index in range(8)] for at in (0, 8))
    assert first == second and sorted(sum(first, [])) == list(range(6, 12))
    assert first[rows.rows :] == [[]] * (8 - rows.rows)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    from megatron_recursive.data.chat.dataset import chat_lengths
    from megatron_recursive.errors import UserError

    write_chat(tmp_path / "chat", LENGTHS)
    write_chat(tmp_path / "other", LENGTHS[::-1])
    for suffix in (".bin", ".idx"):
        (tmp_path / f"other_supervised{suffix}").replace(tmp_path / f"chat_supervised{suffix}")
    with pytest.raises(UserError, match=r"has other lengths than .*chat\.idx"):
        chat_lengths(str(tmp_path / "chat"))
    (tmp_path / "chat_supervised.bin").unlink()
    with pytest.raises(UserError, match=r"chat_supervised\.bin does not exist; .*prepare-chat"):
        chat_lengths(str(tmp_path / "chat"))
