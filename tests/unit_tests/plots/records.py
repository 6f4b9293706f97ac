"""Fabricated metrics.jsonl files, as runs write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_recursive.plan import RecursionConfig, build_plan


def write(file: Path, *records: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def start(*, blocks: int = 3, iteration: int = 0, flops: float = 1e6, time: float | None = None) -> dict[str, Any]:
    """A ``run`` record; ``blocks`` 0 is a plain GPT. Without a time, as older versions wrote it."""
    config = RecursionConfig(enable_recursive_refinement=blocks > 0, num_refinement_blocks=max(blocks, 1),
                             num_latent_refinements=2)  # fmt: skip
    plan = build_plan(config.resolved(embedding_init_std=0.02))
    kind = f"{blocks} blocks, {plan.num_passes} passes" if blocks else "plain GPT"
    record = {"kind": "run", "iteration": iteration, "description": f"2 layers of width 8, {kind}",
              "plan": plan.to_json(), "parameters held": 1234, "parameters unrolled": 9876, "FLOPs per token": flops,
              "tokens per iteration": 64, "world size": 2}  # fmt: skip
    return record if time is None else {**record, "time": time}


def train(iteration: int, loss: float, **metrics: float) -> dict[str, Any]:
    return {"kind": "train", "iteration": iteration, "lm loss": loss, **metrics}


def valid(iteration: int, *by_block: float, **metrics: float) -> dict[str, Any]:
    """The loss after each block, the last of which is the model's; of a plain GPT the only one."""
    blocks = {f"lm loss block {n}": loss for n, loss in enumerate(by_block, start=1)} if len(by_block) > 1 else {}
    return {"kind": "valid", "iteration": iteration, "lm loss": by_block[-1], **blocks, **metrics}
