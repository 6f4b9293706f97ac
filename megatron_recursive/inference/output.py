"""What a generation looks like: text, tables for people, JSON lines for programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from megatron_recursive.inference.generation import Answer, BlockReading, Settings
from megatron_recursive.inference.loading import Loaded

CELL = 24  # columns of a table's cell


def print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False), flush=True)


def answer_record(prompt: str, answer: Answer) -> dict[str, Any]:
    """The JSON line of a result."""
    record: dict[str, Any] = {
        "prompt": prompt, "text": answer.text, "tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens,
        "finish_reason": answer.finish_reason, "seconds": round(answer.seconds, 4),
        "tokens_per_second": round(len(answer.tokens) / answer.seconds, 2),
    }  # fmt: skip
    if answer.batch_size > 1:
        record["batch_size"] = answer.batch_size
    if answer.report is not None:
        record["mean_blocks"] = round(answer.report.mean_blocks, 4)
        record["flops_saved"] = round(answer.report.flops_saved, 4)
        record["blocks"] = {str(taken): tokens for taken, tokens in sorted(answer.report.histogram.items())}
    return record


def summary(answer: Answer) -> str:
    """One line about a result, for people."""
    ended = "ended by itself" if answer.finish_reason == "stop" else "cut at the last token"
    line = f"{len(answer.tokens)} tokens, {len(answer.tokens) / answer.seconds:.1f} a second, {ended}"
    if answer.report is not None:
        saved = round(answer.report.flops_saved, 2) + 0.0  # no "-0%"
        line += f"; {answer.report.mean_blocks:.2f} blocks per token, {saved:.0%} of the FLOPs saved"
    return line


def token_record(loaded: Loaded, prompt: int, step: int, token: int, readings: list[BlockReading]) -> dict[str, Any]:
    """The JSON line of a new token: what every block would have said there."""
    return {
        "prompt": prompt, "step": step, "token": token, "text": loaded.text.decode([token], special=True),
        "blocks": [
            {
                "block": each.block, "token": each.token, "text": loaded.text.decode([each.token], special=True),
                "probability": each.probability, "said_probability": each.said_probability,
                "halting_probability": each.halting_probability,
            }
            for each in readings
        ],
    }  # fmt: skip


class StepTable:
    """A row per new token, a column per block: its most likely token, that token's probability, halting probability."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.columns = loaded, 0

    def add(self, step: int, token: int, readings: list[BlockReading]) -> None:
        if len(readings) > self.columns:
            self.columns = len(readings)
            heads = [f"block {each.block}: p, halt".ljust(CELL) for each in readings]
            print("  ".join(["step", "token".ljust(14), *heads]).rstrip(), flush=True)
        cells = []
        for each in readings:
            halt = "" if each.halting_probability is None else f" {each.halting_probability:.3f}"
            cells.append(f"{self._show(each.token)} {each.probability:.3f}{halt}".ljust(CELL))
        print("  ".join([f"{step:4d}", self._show(token).ljust(14), *cells]).rstrip(), flush=True)

    def _show(self, token: int) -> str:
        text = repr(self.loaded.text.decode([token], special=True))
        return text if len(text) <= 12 else f"{text[:10]}.."


def warn_of_cut(loaded: Loaded, ids: list[int], settings: Settings, name: str) -> None:
    if loaded.max_positions is not None and len(ids) + settings.max_tokens > loaded.max_positions:
        left = loaded.max_positions - len(ids)
        say(f"note: {name} leaves {left} of the {loaded.max_positions} positions, so --max-tokens is {left}")


def step_printer(loaded: Loaded, prompt: int, args: argparse.Namespace) -> Callable[[int, list[BlockReading]], None]:
    table = StepTable(loaded) if sys.stdout.isatty() and not args.json else None
    step = 0

    def show(token: int, readings: list[BlockReading]) -> None:
        nonlocal step
        step += 1
        if table is not None:
            table.add(step, token, readings)
        else:
            print_json(token_record(loaded, prompt, step, token, readings))

    return show


def write(text: str) -> None:
    print(text, end="", flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
