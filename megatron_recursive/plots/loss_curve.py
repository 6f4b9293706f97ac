"""Loss curves of one or several runs: language-model and halting loss, held-out loss and change by refinement block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.figures import blocks_of
from megatron_recursive.plots.picture import pyplot_for, save_picture, single_axes
from megatron_recursive.plots.runs import Run, read_runs

AXES = {"iteration": "iteration", "tokens": "tokens", "flops": "flops", "seconds": "elapsed"}
"""What ``--x`` takes -> where a run's records hold it."""
_UNITS = {
    "tokens": ((1e12, "trillion tokens"), (1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens")),
    "seconds": ((86400, "days"), (3600, "hours"), (60, "minutes")),
}
_STYLES = tuple(zip(("#2166ac", "#d6604d", "#1b7837", "#8c510a", "#762a83", "#4d4d4d", "#01a0a0", "#c51b7d"),
                    "osD^vPX*", strict=True))  # fmt: skip
_NO_SCORES = {"kind", "iteration", "time", "tokens", "FLOPs", "flops", "elapsed", "recurrence"}
_GREY: dict[str, Any] = {"color": "#444444"}

Points = tuple[list[float], list[float]]
"""Where along the x axis, and values."""


@dataclass(frozen=True)
class Drawn:
    """A run as it is drawn: ``x`` is what of its records lies along the x axis, in units of ``unit``."""

    run: Run
    color: str
    marker: str
    x: str
    unit: float

    def points(self, kind: str, metric: str) -> Points:
        """Infinity would leave the axis without a range; a gap in the curve shows the same."""
        found = [(r[self.x] / self.unit, r[metric]) for r in self.run.of(kind) if metric in r and self.x in r]
        return [x for x, _ in found], [y if math.isfinite(y) else math.nan for _, y in found]

    def blocks(self, metric: str, *kinds: str, of: str = "block") -> dict[int, Points]:
        """``"METRIC block 1"``, ``... 2`` by block, of the first kind that has any; ``of`` depth, by depth."""
        for kind in kinds:
            found = {block for record in self.run.of(kind) for block in blocks_of(record, metric, of)}
            if found:
                return {block: self.points(kind, f"{metric} {of} {block}") for block in sorted(found)}
        return {}

    @property
    def window(self) -> int:
        """How many logged values a running mean takes: a tenth of them, an odd number from 3 to 51."""
        return min(max(len(self.run.of("train")) // 20, 1), 25) * 2 + 1


def plot_loss_curve(given: Sequence[str | Path], output: str | Path | None = None, x: str | None = None) -> Path:
    """Draw runs into one picture, a colour a run, on one scale a panel.

    Args:
        output: if left out, beside the metrics of one run (suffix ``.png``), and ``comparison.png`` of several.
        x: one of :data:`AXES`; if left out, tokens of several runs that all tell them, or else iterations.

    Raises:
        UserError: metrics are missing or malformed, matplotlib is not installed, or the picture cannot be written.
    """
    runs = read_runs(given)
    beside = runs[0].file if runs[0].file.exists() else Path(runs[0].file.name)  # of a run that is online
    output = Path(output or (beside.with_suffix(".png") if len(runs) == 1 else "comparison.png"))
    pyplot = pyplot_for(output, "--output")
    for run in runs:
        if not any("lm loss" in r for r in run.records):
            raise UserError(f"{run.file} holds no losses to draw; name the metrics of a run that has logged some")
    drawn, label = _along(runs, x)
    panels = _panels(drawn)
    columns = len(panels) if len(panels) < 4 else 2 if len(panels) == 4 else 3
    rows = -(-len(panels) // columns)
    size = max(5.4 * columns, 8), 3.8 * rows + 0.9
    figure, axes = pyplot.subplots(rows, columns, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    for axis, draw in zip(list(axes.flat), panels, strict=False):
        _draw_panel(axis, draw, label)
    _legends(figure, drawn)
    save_picture(figure, output, dpi=150)
    return output


def draw_curves(given: Sequence[str | Path]) -> list[Any]:
    """The panels of :func:`plot_loss_curve`, each as an axis in a figure of its own; the first has the legends."""
    drawn, label = _along(read_runs(given), None)
    panels = _panels(drawn)
    axes = single_axes(len(panels))
    for axis, draw in zip(axes, panels, strict=True):
        _draw_panel(axis, draw, label)
    _legends(axes[0].figure, drawn, 60)
    return axes


def _draw_panel(axis: Any, draw: Callable[[Any], None], label: str) -> None:
    draw(axis)
    axis.set(xlabel=label, xlim=(0, None))
    axis.tick_params(labelbottom=True)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def plot_score_by_flops(given: Sequence[str | Path], output: Path, score: str) -> None:
    """Draw a held-out score of runs over the FLOPs that each had spent, at the depths that its steps had.

    Raises:
        UserError: as :func:`plot_loss_curve`, or a run has no such score.
    """
    runs = read_runs(given)
    for run in runs:
        if not any("flops" in record for record in run.records):
            raise UserError(f"{run.file} does not tell the FLOPs of its run; plot it without the kind flops")
    drawn, label = _along(runs, "flops")
    figure, axis = pyplot_for(output, "--output").subplots(figsize=(8, 5.5), layout="constrained")
    for each in drawn:
        x, y = each.points("held-out", score)
        if not x:
            known = sorted({name for r in each.run.of("held-out") for name in r if " block " not in name} - _NO_SCORES)
            raise UserError(f"{each.run.file} has no held-out {score}; its scores are {', '.join(known) or 'none'}")
        axis.plot(x, y, "-", marker=each.marker, color=each.color, label=each.run.name[-60:])
    axis.set(xlabel=label, ylabel=f"held-out {score}", xscale="log")
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize="small")
    save_picture(figure, output, dpi=150)


def _along(runs: Sequence[Run], x: str | None) -> tuple[list[Drawn], str]:
    """The runs as they are drawn, and what to write along the x axis."""
    lacking = {n: run.file for n, key in AXES.items() for run in runs if not any(key in r for r in run.records)}
    x = x or ("tokens" if len(runs) > 1 and "tokens" not in lacking else "iteration")
    if x in lacking:
        known = ", ".join(name for name in AXES if name not in lacking)
        raise UserError(f"--x {x}: {lacking[x]} does not tell it; choose one of {known}")
    end = max(r.get(AXES[x], 0) for run in runs for r in run.records)
    unit, label = next(((u, name) for u, name in _UNITS.get(x, ()) if end >= u), (1.0, x))
    if x == "flops":
        power = int(math.log10(max(end, 1)))
        unit, label = 10.0**power, f"training FLOPs (1e{power})"
    if x == "seconds":
        label += " of training, evaluations and saves included"
    return [Drawn(run, *_STYLES[n % len(_STYLES)], AXES[x], unit) for n, run in enumerate(runs)], label


def _panels(drawn: Sequence[Drawn]) -> list[Callable[[Any], None]]:
    panels: list[Callable[[Any], None]] = [lambda axis: _draw_loss(axis, drawn, "lm loss", "language-model loss")]
    kind = "held-out" if any(each.run.of("held-out") for each in drawn) else "train"  # a run may evaluate nothing
    losses = [each.blocks("lm loss", kind) for each in drawn]
    if any(losses):
        # What has no blocks (a plain GPT) stands beside their last ones.
        losses = [b or {1: each.points(kind, "lm loss")} for each, b in zip(drawn, losses, strict=True)]
        what = f"{kind.replace('train', 'training')} loss after each block"
        panels.append(lambda axis: _draw_blocks(axis, drawn, losses, what))
    depths = [each.blocks("lm loss", "held-out", of="depth") for each in drawn]
    if any(depths):
        panels.append(lambda axis: _draw_blocks(axis, drawn, depths, "held-out loss at each depth", of="depth"))
    if any("halt loss" in r for each in drawn for r in each.run.records):
        panels.append(lambda axis: _draw_loss(axis, drawn, "halt loss", "halting loss"))
    changes = [each.blocks("output change", "held-out", "train") for each in drawn]
    if any(changes):
        title = "relative change of the output state by each block"
        panels.append(lambda axis: _draw_blocks(axis, drawn, changes, title, is_loss=False))
    return panels


def _draw_loss(axis: Any, drawn: Sequence[Drawn], metric: str, title: str) -> None:
    """Values of single iterations faint, their running mean as a line, each evaluation as a mark."""
    for each in drawn:
        x, y = each.points("train", metric)
        half = each.window // 2
        around = [y[max(0, at - half) : at + half + 1] for at in range(len(y))]
        axis.plot(x, y, ".", color=each.color, ms=5, alpha=0.35, mew=0)
        axis.plot(x, [sum(values) / len(values) for values in around], "-", color=each.color, lw=1.5)
        x, y = each.points("held-out", metric)
        axis.plot(x, y, ":", marker=each.marker, color=each.color, lw=1.2, ms=7, mec="white", mew=1.0, zorder=3)
    axis.set_title(title, fontsize="medium")
    axis.set_ylabel("nats per token")


def _draw_blocks(
    axis: Any, drawn: Sequence[Drawn], blocks: Sequence[dict[int, Points]], title: str, *, is_loss: bool = True,
    of: str = "block",
) -> None:
    """Earlier blocks are paler, and wider so that they show under later ones that lie on them."""

    def style(place: int, count: int) -> dict[str, Any]:
        late = 1.0 if count == 1 else place / (count - 1)
        return {"alpha": 0.3 + 0.7 * late, "lw": 3.4 - 2 * late, "ms": (8 - 3 * late) * (1 if count <= 6 else 0.6)}

    for each, curves in zip(drawn, blocks, strict=True):
        for place, (x, y) in enumerate(curves.values()):
            axis.plot(x, y, "-", marker=each.marker, color=each.color, **style(place, len(curves)))
    names = sorted({block for curves in blocks for block in curves})
    for place, block in enumerate(names):
        if len(names) <= 6 or block in (names[0], names[-1]):
            axis.plot([], [], "-o", label=f"{of} {block}", **_GREY, **style(place, len(names)))
    axis.legend(fontsize="small", framealpha=0.8, edgecolor="none")
    axis.set_title(title, fontsize="medium")
    if is_loss:
        axis.set_ylabel("nats per token")
    # A converging recursion shrinks by a factor in each block; one that does not move at all has no logarithm.
    elif all(value > 0 for curves in blocks for _, values in curves.values() for value in values):
        axis.set_yscale("log")


def _legends(figure: Any, drawn: Sequence[Drawn], width: int = 100) -> None:
    """Runs above, kinds of values below; ``width`` in characters."""
    from matplotlib.lines import Line2D

    names = []
    for each in drawn:
        results = [r["lm loss"] for r in each.run.of("held-out") if "lm loss" in r]
        name = each.run.name[-60:] + (f" (held-out lm loss {results[-1]:.3f})" if results else "")
        names.append(Line2D([], [], color=each.color, marker=each.marker, lw=3, label=name))
    columns = max(1, min(len(names), width // max(len(str(name.get_label())) for name in names)))
    figure.legend(handles=names, loc="outside upper center", ncols=columns, frameon=False)
    windows = " or ".join(map(str, sorted({each.window for each in drawn})))
    kinds = [
        Line2D([], [], ls="", marker=".", ms=6, alpha=0.5, mew=0, label="training, one logged iteration", **_GREY),
        Line2D([], [], lw=1.5, label=f"training, mean of {windows} logged iterations", **_GREY),
        Line2D([], [], ls=":", marker="o", ms=6, label="held-out, one evaluation", **_GREY),
    ]
    columns = 3 if width >= 100 else 1
    figure.legend(handles=kinds, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
