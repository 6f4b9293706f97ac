"""The health of a recursive model as a picture: states, heads, resets, calibration, exits, trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.plots.depth_sweep import COLOURS
from megatron_recursive.plots.picture import pyplot_for, save_picture

PANELS = ("change of the states by pass", "loss of the head by pass", "loss with the state reset",
          "halting probability and share right", "where tokens leave", "paths of seven tokens")  # fmt: skip


def plot_health(record: dict[str, Any], output: Path) -> None:
    """Draw the record of the command ``health``; a UserError says where that is not possible."""
    pyplot = pyplot_for(output, "--output")
    figure, grid = pyplot.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    draw_panels(list(grid.flat), record)
    title = "{family}, depth {depth}, {samples} samples of {sequence_length} tokens".format_map(record)
    figure.suptitle(f"{Path(record['model']).name}: {title}", fontsize="medium")
    save_picture(figure, output, dpi=110)


def draw_panels(axes: Sequence[Any], record: dict[str, Any]) -> None:
    """On an axis for each of :data:`PANELS`."""
    moves, lens, reset, reliability, exits, paths = axes

    def line(axis: Any, points: Any, x: str, y: str, number: int = 0, **looks: Any) -> None:
        chosen = [(each[x], each[y]) for each in points if each.get(y) is not None]
        axis.plot(*zip(*chosen, strict=True), **{"marker": "osD^"[number % 4], "color": COLOURS[number], **looks})

    for number, target in enumerate(sorted({each["target"] for each in record["passes"]}, reverse=True), 1):
        moved = [each for each in record["passes"] if each["target"] == target]
        line(moves, moved, "pass", "change", number, label=f"change of the {target}")
    line(moves, record["passes"], "pass", "token_cosine", label="token cosine")
    line(lens, record["passes"], "pass", "loss", label="the head on the state")
    tried = {f"reset, last {each['remaining']}": each["loss"] for each in reversed(record.get("reset", ()))}
    if "one_more" in record:
        tried["one more"] = record["one_more"]["loss"]
    line(reset, [{"x": x, "y": y} for x, y in tried.items()], "x", "y", linestyle="", markersize=12)
    for axis in (lens, reset):
        axis.axhline(record["loss"], color="black", linestyle="--", linewidth=1, label="the model")
    for axis, key in ((reliability, "calibration"), (exits, "exits")):
        axis.text(0.5, 0.5, record["left_out"].get(key, ""), ha="center", transform=axis.transAxes)
    if "calibration" in record:
        reliability.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="calibrated")
        line(reliability, record["calibration"]["bins"], "probability", "right", label="halting head")
    for number, (exit, found) in enumerate(record.get("exits", {}).items()):
        places, looks = [each["block"] + 0.2 * number - 0.3 for each in found["blocks"]], ("", "//", "..", "xx")
        exits.bar(places, [each["share"] for each in found["blocks"]], 0.2, color=COLOURS[number], hatch=looks[number],
                  edgecolor="black", label=exit)  # fmt: skip
    for number, token in enumerate(record["trajectories"]["tokens"]):
        points = [{"x": x, "y": y} for x, y in token["points"]]
        line(paths, points, "x", "y", number, marker=".", linewidth=1, label=f"token {token['position']}")
        line(paths, points[-1:], "x", "y", number, marker="*", markersize=12, markeredgecolor="black")
    for axis in (moves, lens, exits):
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis, x, y in ((moves, "pass", ""), (lens, "pass", "loss"), (reset, "state reset, or a block more", "loss"),
                       (reliability, "halting probability", "share right"), (exits, "leave after block", "share"),
                       (paths, "1st principal axis (star: the last pass)", "2nd principal axis")):  # fmt: skip
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
