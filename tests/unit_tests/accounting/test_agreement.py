"""One configuration has one figure, whoever states it: start of a run, metrics, count, plan, summarize."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed

MODEL = "--num-layers 6 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 127".split()
TRAINING = """--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 3000 --lr 1e-3
    --mock-data --split 90,5,5 --tokenizer-type NullTokenizer --eval-iters 1""".split()  # fmt: skip
WINDOW = "--recursion-family recurrent --num-prelude-layers 1 --num-recurrences 4 --backprop-depth 2 --injection add"
CASES = {
    "plain": "--disable-recursive-refinement",
    "core": "--num-refinement-blocks 3 --num-latent-refinements 1",
    "supervised": "--num-refinement-blocks 3 --enable-deep-supervision",
    "recurrent": WINDOW,
    "looped": "--recursion-family looped --num-refinement-blocks 3",
    "hierarchical": "--recursion-family hierarchical",
    "drawn depth": f"{WINDOW} --recurrence-distribution poisson-lognormal",
    "growth": f"{WINDOW} --grow-depth-at 0.5:6",
}


def _figures(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Case -> parameters held, FLOPs per token, and bytes of weights of every place that tells them."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    from megatron_recursive.commands import main
    from megatron_recursive.training.arguments import parse_arguments
    from megatron_recursive.training.memory_report import memory_of_run
    from megatron_recursive.training.model_provider import model_config_from_args
    from megatron_recursive.training.report import announce

    def told(*words: str) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            main([*words, "--json"])
        return json.loads(said.getvalue())

    found: dict[str, dict[str, list[float]]] = {}
    for name, flags in CASES.items():
        sys.argv = ["pretrain", *MODEL, *TRAINING, *flags.split()]
        args, recursion = parse_arguments()
        config = model_config_from_args(args, recursion)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            description = announce(args, config)
        (printed,) = re.findall(r"held ([\d,]+), unrolled.*FLOPs per token: (\S+) ", said.getvalue())
        records = [{"kind": "run", "iteration": 0, "time": 0.0, **description},
                   {"kind": "train", "iteration": 1, "tokens": 64, "lm loss": 1.0}]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
        (run,) = told("summarize", str(folder))["runs"]
        count = told("count", *MODEL, "--max-position-embeddings", "32", *flags.split())
        plan = told("plan", "--gpus", "1", *MODEL, "--max-position-embeddings", "32", *flags.split())
        found[name] = {
            "parameters": [description["parameters held"], count["parameters"]["held"]["total"],
                           plan["parameters_held"], float(printed[0].replace(",", ""))],
            "FLOPs": [description["FLOPs per token"], count["flops_per_token"]["training"], plan["flops_per_token"],
                      run["FLOPs per token"], run["FLOPs"] / run["tokens"], float(printed[1])],
            "weights": [memory_of_run(args, config)[0].weights, count["memory"]["bytes_by_stage"][0]["weights"],
                        plan["layouts"][0]["weights_gib"] * 2**30],
        }  # fmt: skip
        destroy_global_vars()
        destroy_num_microbatches_calculator()
    return found


def test_all_places_state_the_same_figures(tmp_path: Path) -> None:
    (found,) = run_distributed(_figures, 1, tmp_path, timeout=120)
    for name, figures in found.items():
        # A run counts the depths that its seed draws, the others what is to be expected.
        tolerance = {"FLOPs": 2e-2 if name == "drawn depth" else 5e-4}
        for what, values in figures.items():
            assert values == pytest.approx([values[0]] * len(values), rel=tolerance.get(what, 1e-9)), (name, what)


def _prices(*runs: str) -> list[Any]:
    """Of the passes of each run, by which the ring's phases are chosen."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    from megatron_recursive.training.arguments import parse_arguments
    from megatron_recursive.training.model_provider import model_config_from_args

    found = []
    for flags in runs:
        sys.argv = ["pretrain", *MODEL, *TRAINING, *CASES["core"].split(), *flags.split()]
        config = model_config_from_args(*parse_arguments())
        found.append(config.transformer.pipeline_costs(config.plan))
        destroy_global_vars()
        destroy_num_microbatches_calculator()
    return found


def test_passes_are_priced_at_the_length_of_samples_and_not_at_the_positions_of_a_model() -> None:
    more = "--max-position-embeddings 4096"
    ((price, of_more, longer),) = run_distributed(_prices, 1, "", more, f"{more} --seq-length 64")
    assert price == of_more != longer
