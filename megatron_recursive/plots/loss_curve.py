"""Loss curves of a recursive run: losses, held-out loss of each refinement block, and how far each block moves."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plots.metrics_file import read_records
from megatron_recursive.plots.picture import save_picture

DRAWN = ("train", "valid")
LOSSES = ("lm loss", "halt loss", "total loss")
FORMATS = ("png", "pdf", "svg")
_BLOCK_METRIC = re.compile(r"(lm loss|output change) block (\d+)")

Curve = dict[int, float]
"""Iteration -> value."""
Curves = dict[tuple[str, str], Curve]
"""(kind, metric) -> curve."""


def read_curves(metrics_file: str | Path) -> Curves:
    """Read the metrics that are drawn; later lines for an iteration and kind (a resumed run) replace earlier ones.

    Raises:
        UserError: the file is missing or holds no metrics, or a line is malformed; the message names file and line.
    """
    latest = {(r["kind"], r["iteration"]): r for r in read_records(metrics_file) if r["kind"] in DRAWN}
    curves: Curves = defaultdict(dict)
    for (kind, iteration), record in sorted(latest.items()):
        for name, value in record.items():
            if name in LOSSES or _BLOCK_METRIC.fullmatch(name):
                # Infinity would leave the axis without a range; a gap in the curve shows the same.
                curves[kind, name][iteration] = float(value) if math.isfinite(value) else math.nan
    if not curves:
        raise UserError(f"{metrics_file} holds no losses to draw; name the metrics.jsonl of a run that has logged some")
    return dict(curves)


def plot_loss_curve(metrics_file: str | Path, output: str | Path | None = None) -> Path:
    """Draw the run of ``metrics_file``; the picture goes beside it (suffix ``.png``) unless ``output`` is given.

    Panels: losses over iterations; held-out language-model loss of each refinement block, if logged; relative change
    of the output state by each block, if logged (held-out where there is any, else training).

    Raises:
        UserError: the metrics are missing or malformed, matplotlib is not installed, or the picture cannot be written.
    """
    output = Path(metrics_file).with_suffix(".png") if output is None else Path(output)
    if output.suffix[1:] not in FORMATS:
        raise UserError(f"--output {output} has no picture's suffix; end it with one of .{', .'.join(FORMATS)}")
    curves = read_curves(metrics_file)
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("drawing needs matplotlib; run pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(curves)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False, layout="constrained"
    )
    try:
        for axis, draw in zip(axes[0], panels, strict=True):
            draw(axis)
            axis.set_xlabel("iteration")
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small", frameon=False)
        figure.suptitle(str(metrics_file), fontsize="medium")
        save_picture(figure, output, dpi=150)
    finally:
        pyplot.close(figure)
    return output


def _panels(curves: Curves) -> list[Callable[[Any], None]]:
    panels: list[Callable[[Any], None]] = []
    if any(name in LOSSES for _, name in curves):
        panels.append(lambda axis: _draw_losses(axis, curves))
    block_losses = _blocks(curves, "lm loss", ("valid",))
    if block_losses:
        panels.append(lambda axis: _draw_blocks(axis, block_losses, "held-out loss after each block", "nats per token"))
    changes = _blocks(curves, "output change", ("valid", "train"))
    if changes:
        panels.append(lambda axis: _draw_changes(axis, changes))
    return panels


def _draw_losses(axis: Any, curves: Curves) -> None:
    for color, name in enumerate(LOSSES):
        for kind, style, width in (("train", "-", 1.0), ("valid", "o--", 1.5)):
            if (kind, name) in curves:
                curve = curves[kind, name]
                label = f"{name}, {'training' if kind == 'train' else 'held-out'}"
                axis.plot(
                    curve.keys(), curve.values(), style, color=f"C{color}", lw=width, ms=4,
                    alpha=0.6 if kind == "train" else 1.0, label=label,
                )  # fmt: skip
    axis.set_title("losses", fontsize="medium")
    axis.set_ylabel("nats per token")


def _draw_blocks(axis: Any, blocks: dict[int, Curve], title: str, unit: str) -> None:
    from matplotlib import colormaps

    for position, (block, curve) in enumerate(blocks.items()):
        color = colormaps["viridis"](0.9 * position / max(len(blocks) - 1, 1))
        axis.plot(curve.keys(), curve.values(), "o-", color=color, lw=1.2, ms=3, label=f"block {block}")
    axis.set_title(title, fontsize="medium")
    axis.set_ylabel(unit)


def _draw_changes(axis: Any, blocks: dict[int, Curve]) -> None:
    _draw_blocks(axis, blocks, "change of the output state by each block", "relative change")
    # A converging recursion shrinks by a factor in each block; one that does not move at all has no logarithm.
    if all(value > 0 for curve in blocks.values() for value in curve.values()):
        axis.set_yscale("log")


def _blocks(curves: Curves, metric: str, kinds: tuple[str, ...]) -> dict[int, Curve]:
    """Curves of ``"METRIC block 1"``, ``... 2`` by block number, of the first kind that has any."""
    for kind in kinds:
        found = {}
        for (curve_kind, name), curve in curves.items():
            match = _BLOCK_METRIC.fullmatch(name)
            if match and match[1] == metric and curve_kind == kind:
                found[int(match[2])] = curve
        if found:
            return dict(sorted(found.items()))
    return {}
