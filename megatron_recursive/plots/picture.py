"""Figures without a screen, written beside their final name and renamed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import missing_package
from megatron_recursive.data.files import replacing
from megatron_recursive.errors import UserError

FORMATS = ("png", "pdf", "svg")
# Readable for the colour-blind (Okabe and Ito); for print, draw with markers or hatches too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def pyplot_for(output: Path, flag: str) -> Any:
    """matplotlib's pyplot without a screen. A UserError says where it is missing, or what ``flag`` must end with."""
    if output.suffix[1:] not in FORMATS:
        raise UserError(f"{flag} {output} has no picture's suffix; end it with one of .{', .'.join(FORMATS)}")
    try:
        import matplotlib
    except ImportError as error:
        raise missing_package("matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def single_axes(count: int) -> list[Any]:
    """Axes, each in a figure of its own that a phone's screen shows whole."""
    pyplot = pyplot_for(Path("a.png"), "")
    return [pyplot.subplots(figsize=(5.2, 3.7), layout="constrained")[1] for _ in range(count)]


def png_of(axis: Any) -> bytes:
    """The picture of an axis of :func:`single_axes`, whose figure is closed."""
    from matplotlib import pyplot

    drawn = io.BytesIO()
    axis.figure.savefig(drawn, format="png", dpi=140)
    pyplot.close(axis.figure)
    return drawn.getvalue()


def save_picture(figure: Any, output: Path, dpi: int) -> None:
    """Save in the format of the output's suffix, and close. A UserError says where that is not possible."""
    from matplotlib import pyplot

    try:
        with replacing(output) as (partial,):
            figure.savefig(partial, format=output.suffix[1:], dpi=dpi)
    finally:
        pyplot.close(figure)
