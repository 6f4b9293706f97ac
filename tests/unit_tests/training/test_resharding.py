"""Any layout goes on from any other's checkpoint, with the optimizer's moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.grids import grid
from tests.unit_tests.training.runs import copy_checkpoint, losses_of, save_to, train

STILL = ["--hidden-dropout", "0", "--attention-dropout", "0"]
LAYOUTS = {
    "one": ([], 1), "DP 2": ([], 2), "TP 2": (["--tensor-model-parallel-size", "2"], 2),
    "PP 2": (["--pipeline-model-parallel-size", "2"], 2),
    "DP 2, TP 2": (["--tensor-model-parallel-size", "2"], 4),
    "buckets": (["--overlap-grad-reduce", "--ddp-bucket-size", "5000"], 2),
}  # fmt: skip
OPTIMIZERS = {
    "plain": [], "distributed": ["--use-distributed-optimizer"], "plain bf16": ["--bf16"],
    "distributed bf16": ["--use-distributed-optimizer", "--bf16"],
}  # fmt: skip
CHANGES = [
    (optimizer, saved, read)
    for optimizer in OPTIMIZERS
    for saved, read in [("DP 2", "PP 2"), ("DP 2", "TP 2"), ("PP 2", "one"), ("TP 2", "DP 2, TP 2"), ("PP 2", "TP 2"),
                        ("DP 2", "one"), ("DP 2", "buckets"), ("DP 2", "DP 2")]
]  # fmt: skip
QUICK = [("distributed", "DP 2", "PP 2"), ("distributed bf16", "DP 2", "TP 2"), ("plain bf16", "PP 2", "one")]
_SAVED: dict[tuple[str, str], Path] = {}


def whole(optimizer: str, layout: str, factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted iterations at a layout, saved after three."""
    if (optimizer, layout) not in _SAVED:
        flags, ranks = LAYOUTS[layout]
        folder = factory.mktemp("whole")
        assert train(*save_to(folder), *STILL, *OPTIMIZERS[optimizer], *flags, world_size=ranks) is None
        _SAVED[optimizer, layout] = folder
    return _SAVED[optimizer, layout]


@pytest.mark.parametrize(("optimizer", "saved", "read"), grid(CHANGES, quick=QUICK))
def test_another_layout_goes_on(
    optimizer: str, saved: str, read: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = whole(optimizer, saved, tmp_path_factory)
    copy_checkpoint(source, tmp_path, 3)
    flags, ranks = LAYOUTS[read]
    assert train(*save_to(tmp_path), *STILL, *OPTIMIZERS[optimizer], *flags, world_size=ranks) is None
    expected = {i: losses_of(source)[i] for i in (4, 5, 6)}
    assert losses_of(tmp_path) == pytest.approx(expected, rel=2e-3 if "bf16" in optimizer else 1e-5)
