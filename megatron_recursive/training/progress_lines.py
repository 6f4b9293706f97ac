"""The lines of a run in the compact log style: one an interval, a table an evaluation. At most 120 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_recursive.figures import blocks_of, count, duration, perplexity

MOST_BLOCKS = 3  # columns for losses by block; of more blocks some are shown, the first and the last among them

Metrics = Mapping[str, float]


def shown_blocks(blocks: Sequence[int], most: int = MOST_BLOCKS) -> list[int]:
    """At most so many of the blocks, evenly spread, from the first to the last."""
    if len(blocks) <= most:
        return list(blocks)
    return [blocks[round(place * (len(blocks) - 1) / (most - 1))] for place in range(most)]


def header(metrics: Metrics, iterations: int) -> str:
    """Names over the columns of :func:`row`."""
    blocks = [f"block {block}" for block in shown_blocks(list(blocks_of(metrics)))]
    halting = ["halt loss", "steps"] if "halt loss" in metrics else []
    halting += ["expected", "exit"] if "mean exit loop" in metrics else []
    names = ["tokens", "lm loss", *blocks, *halting, "grad", "lr", "tokens/s", "left"]
    return f"{'iteration':>{_iteration_width(iterations)}}" + "".join(f"{n:>{_width(n)}}" for n in names)


def row(
    iteration: int, iterations: int, tokens: float, metrics: Metrics, *,
    grad_norm: float | None, learning_rate: float | None, tokens_per_second: float | None, left: float | None,
) -> str:  # fmt: skip
    """One line an interval; ``metrics`` are means over it. ``left`` is in seconds."""
    by_block = blocks_of(metrics)
    cells = {"tokens": count(tokens), "lm loss": f"{metrics['lm loss']:.4f}"}
    cells |= {f"block {block}": f"{by_block[block]:.3f}" for block in shown_blocks(list(by_block))}
    if "halt loss" in metrics:
        cells["halt loss"] = f"{metrics['halt loss']:.3f}"
        steps = metrics.get("expected refinement steps")
        cells["steps"] = "-" if steps is None else f"{steps:.2f}"
    if "mean exit loop" in metrics:
        cells |= {"expected": f"{metrics['expected lm loss']:.4f}", "exit": f"{metrics['mean exit loop']:.2f}"}
    cells["grad"] = "-" if grad_norm is None else f"{grad_norm:.3g}"
    cells["lr"] = "-" if learning_rate is None else f"{learning_rate:.2e}"
    cells["tokens/s"] = "-" if tokens_per_second is None else count(tokens_per_second)
    cells["left"] = "-" if left is None else duration(left)
    start = f"{iteration}/{iterations}"
    return f"{start:>{_iteration_width(iterations)}}" + "".join(f"{c:>{_width(n)}}" for n, c in cells.items())


def _iteration_width(iterations: int) -> int:
    return max(9, 2 * len(str(iterations)) + 1)


def _width(name: str) -> int:
    return max(len(name), 7 if name in ("tokens", "left", "steps") else 8 if name in ("lr", "grad") else 6) + 2


def evaluation(title: str, metrics: Metrics) -> str:
    """A table by block: what was lost after each, and how far it moved the output state."""
    lines = [f"{title}: lm loss {metrics['lm loss']:.4f} (perplexity {perplexity(metrics['lm loss']):,.1f})"]
    losses, changes = blocks_of(metrics), blocks_of(metrics, "output change")
    if losses:
        shown = shown_blocks(list(losses), 10)
        lines.append("    after block  " + "".join(f"{block:>8}" for block in shown))
        lines.append("    lm loss      " + "".join(f"{losses[block]:>8.3f}" for block in shown))
        if set(shown) <= set(changes):
            lines.append("    state moved  " + "".join(f"{changes[block]:>8.3f}" for block in shown))
    if depths := blocks_of(metrics, of="depth"):
        shown = shown_blocks(list(depths), 10)
        lines.append("    at depth     " + "".join(f"{depth:>8}" for depth in shown))
        lines.append("    lm loss      " + "".join(f"{depths[depth]:>8.3f}" for depth in shown))
    facts = [f"token accuracy {metrics['token accuracy']:.1%}"] if "token accuracy" in metrics else []
    if "expected refinement steps" in metrics:
        facts.append(f"{metrics['expected refinement steps']:.2f} blocks until a token halts, on average")
    if "mean exit loop" in metrics:
        facts.append(f"{metrics['mean exit loop']:.2f} loops until the gate lets a token go, on average")
    names = ("halt loss", "expected lm loss", "exit entropy", "token cosine")
    facts += [f"{name} {metrics[name]:.3f}" for name in names if name in metrics]
    if facts:
        lines.append("    " + ", ".join(facts))
    return "\n".join(lines)
