"""What each layer changes as a picture: block influence above, angular distance below, coloured by stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_recursive.plots.picture import pyplot_for, save_picture

# Readable in print and for the colour-blind: they differ in lightness and hatching too.
LOOKS = {"prelude": ("#0072B2", ""), "core": ("#E69F00", "//"), "coda": ("#009E73", ".."), "left_out": ("#CCCCCC", "")}


def plot_layer_scores(record: dict[str, Any], output: Path) -> None:
    """Draw the record of the command ``layers``; a UserError says where that is not possible."""
    pyplot, layers = pyplot_for(output, "--output"), record["layers"]
    figure, axes = pyplot.subplots(2, 1, figsize=(max(6, 2 + 0.22 * len(layers)), 6), sharex=True, layout="constrained")
    for axis, (key, said) in zip(axes, {
        "influence": "block influence\n1 - mean cosine", "distance": "angular distance\narccos(cosine) / π",
    }.items(), strict=True):  # fmt: skip
        for stack, (colour, hatch) in LOOKS.items():
            chosen = record[stack]
            if chosen:
                axis.bar(chosen, [layers[n][key] for n in chosen], color=colour, hatch=hatch, edgecolor="black",
                         linewidth=0.5, label=f"{stack.replace('_', ' ')} ({len(chosen)})")  # fmt: skip
        axis.set_ylabel(said)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize="small")
    title = f"{Path(record['model']).name}, {record['samples']} samples of {record['sequence_length']} tokens"
    axes[0].set_title(title, fontsize="medium")
    axes[1].set_xlabel("layer")
    axes[1].set_xticks(range(0, len(layers), 1 + len(layers) // 20))
    save_picture(figure, output, dpi=130)
