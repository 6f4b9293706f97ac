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
    ("distributed", "DP 2", "PP 2"), ("distributed", "DP 2", "TP 2"), ("distributed", "PP 2", "one"),
    ("distributed", "TP 2", "DP 2, TP 2"), ("distributed", "DP 2", "buckets"), ("distributed bf16", "DP 2", "PP 2"),
    ("plain bf16", "PP 2", "TP 2"),
]  # fmt: skip
_SAVED: dict[tuple[str, str], Path] = {}


def whole(optimizer: str, layout: str, factory: pytest.TempPathFactory, *more: str) -> Path:
    """Six uninterrupted iterations at a layout, saved after three."""
    key = (f"{optimizer} {' '.join(more)}", layout)
    if key not in _SAVED:
        flags, ranks = LAYOUTS[layout]
        folder = factory.mktemp("whole")
        assert train(*save_to(folder), *STILL, *OPTIMIZERS[optimizer], *flags, *more, world_size=ranks) is None
        _SAVED[key] = folder
    return _SAVED[key]


def go_on(source: Path, target: Path, optimizer: str, layout: str, *more: str) -> str | None:
    """Iterations 4 to 6 from a checkpoint of 3, without another save."""
    copy_checkpoint(source, target, 3)
    flags, ranks = LAYOUTS[layout]
    metrics = ["--load", str(target), "--metrics-file", str(target / "metrics.jsonl")]
    return train(*metrics, *STILL, *OPTIMIZERS[optimizer], *flags, *more, world_size=ranks)


@pytest.mark.parametrize(("optimizer", "saved", "read"), grid(CHANGES, quick=CHANGES[:1]))
def test_another_layout_goes_on(
    optimizer: str, saved: str, read: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = whole(optimizer, saved, tmp_path_factory)
    assert go_on(source, tmp_path, optimizer, read) is None
    expected = {i: losses_of(source)[i] for i in (4, 5, 6)}
    assert losses_of(tmp_path) == pytest.approx(expected, rel=2e-3 if "bf16" in optimizer else 1e-5)


@pytest.mark.grid
def test_what_cannot_go_on_says_layout_or_optimizer(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The buffers of one layout are read at other data-parallel sizes alone; one kind of optimizer not by the other."""
    source = whole("distributed", "DP 2", tmp_path_factory, "--no-dist-ckpt-optim-fully-reshardable")
    said = str(go_on(source, tmp_path / "PP", "distributed", "PP 2"))
    assert "in the buffers of its own layout, --pipeline-model-parallel-size 1 (this run: 2); go on" in said
    assert "with --dist-ckpt-optim-fully-reshardable up to a save" in said and "--no-load-optim" in said
    assert go_on(source, tmp_path / "one", "distributed", "one", "--exit-interval", "5") is None
    assert losses_of(tmp_path / "one") == pytest.approx({i: losses_of(source)[i] for i in (4, 5)}, rel=1e-5)
    said = str(go_on(source, tmp_path / "plain", "plain", "one"))
    assert "of another optimizer, with --use-distributed-optimizer on (this run: off)" in said and "beside" not in said
    assert go_on(source, tmp_path / "anew", "plain", "one", "--no-load-optim", "--exit-interval", "4") is None
