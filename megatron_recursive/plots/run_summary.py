"""A run in a few lines: what was trained, where its losses began and ended, and whether its depth is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_recursive.errors import UserError
from megatron_recursive.plots.metrics_file import read_records


def summarize_run(metrics_file: str | Path) -> str:
    """The summary of a run's ``metrics.jsonl`` as text.

    Raises:
        UserError: the file is missing, malformed (the message names the line), or holds no training metrics.
    """
    records = read_records(metrics_file)
    train = [r for r in records if r["kind"] == "train"]
    if not train:
        raise UserError(f"{metrics_file} holds no training metrics yet; wait for the run's first logged iteration.")
    lines = [_what(records), _losses(train)]
    held_out = [r for r in records if r["kind"] == "valid"]
    if held_out:
        lines += _held_out(held_out[-1])
    starts = sum(r["kind"] == "run" for r in records)
    if starts > 1:
        lines.append(f"started {starts} times (resumed from its checkpoints)")
    alarms = [r for r in records if r["kind"] == "alarm"]
    lines += [f"ALARM at iteration {r['iteration']}: {r['alarm']}" for r in alarms[-2:]]
    return "\n".join(lines)


def _what(records: list[dict[str, Any]]) -> str:
    run = next((r for r in reversed(records) if r["kind"] == "run"), None)
    if run is None:
        return "trained: (the run's description is not in the file)"
    return (
        f"trained: {run['description']}; parameters held {run['parameters held']:,}, unrolled "
        f"{run['parameters unrolled']:,}; {run['tokens per iteration']:,} tokens per iteration on "
        f"{run['world size']} rank{'s' if run['world size'] > 1 else ''}"
    )


def _losses(train: list[dict[str, Any]]) -> str:
    first, last = train[0], max(train, key=lambda r: r["iteration"])
    parts = []
    for name in ("lm loss", "halt loss", "total loss"):
        if name in first and name in last:
            parts.append(f"{name} {first[name]:.3f} -> {last[name]:.3f}")
    return f"iterations {first['iteration']} to {last['iteration']}: {', '.join(parts)}"


def _held_out(record: dict[str, Any]) -> list[str]:
    lines = [f"held-out lm loss at iteration {record['iteration']}: {record['lm loss']:.3f}"]
    blocks = {int(k.rsplit(" ", 1)[1]): v for k, v in record.items() if k.startswith("lm loss block ")}
    if blocks:
        each = ", ".join(f"{block}: {blocks[block]:.3f}" for block in sorted(blocks))
        lines.append(f"held-out lm loss after each refinement block: {each}")
    if "expected refinement steps" in record:
        lines.append(f"expected refinement steps at the halting threshold: {record['expected refinement steps']:.2f}")
    return lines
