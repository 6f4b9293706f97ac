"""Figures without a screen, written beside their final name and renamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        raise UserError("drawing needs matplotlib; run pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, output: Path, dpi: int) -> None:
    """Save in the format of the output's suffix, and close. A UserError says where that is not possible."""
    from matplotlib import pyplot

    try:
        with replacing(output) as (partial,):
            figure.savefig(partial, format=output.suffix[1:], dpi=dpi)
    finally:
        pyplot.close(figure)
