"""Tiny training runs for the tests of this folder: in a pool worker (no import to wait for) or as a real command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.distributed import REPOSITORY, run_distributed

SCRIPT = REPOSITORY / "examples" / "recursive_gpt" / "pretrain_recursive_gpt.py"

# A vocabulary of 127 is padded to 128 under TP 1, but would be padded to 256 under TP 2.
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 6 --lr 1e-2 --lr-warmup-iters 1 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 127 --eval-iters 0 --eval-interval 100 --log-interval 1 "
    "--split 90,5,5 --num-workers 0 --lr-decay-iters 9"
).split()
RECURSION = ["--num-refinement-blocks", "2", "--num-latent-refinements", "1"]
PLAIN = ["--disable-recursive-refinement"]


def in_worker(argv: list[str]) -> str | None:
    """What the entry script does, in a process that has Megatron imported.

    Returns:
        None, or the sentence that the run ended with.
    """
    from megatron.training import training

    from megatron_recursive.errors import UserError
    from megatron_recursive.training import pretrain

    # Left by an earlier job on this worker; a rank without would skip an all-reduce that the others wait in.
    training._STARTUP_TIMESTAMPS.update(dict.fromkeys(training._STARTUP_TIMESTAMPS))
    sys.argv = [str(SCRIPT), *argv]
    try:
        pretrain._run()
    except UserError as error:
        return str(error)
    return None


def train(*argv: str | Path, recursion: list[str] | None = None, world_size: int = 1) -> str | None:
    """Train the tiny model; later flags win. Returns None, or the sentence of a refusal."""
    flags = [*FLAGS, *(RECURSION if recursion is None else recursion), *map(str, argv)]
    return run_distributed(in_worker, world_size, flags, timeout=120)[0]


def save_to(folder: Path, every: int = 3) -> list[str]:
    """Flags of a run that saves, and that resumes when it is started again."""
    return ["--save", str(folder), "--load", str(folder), "--save-interval", str(every)]


def metrics_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Iteration to everything that ``metrics.jsonl`` holds on it, at full precision; a repeated iteration: the last."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["iteration"]: record for record in records if record["kind"] == "train"}


def losses_of(folder: Path) -> dict[int, float]:
    return {iteration: record["lm loss"] for iteration, record in metrics_of(folder).items()}
