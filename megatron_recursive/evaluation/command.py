"""What the command ``evaluate`` does: the harness's command line as it is, once or at each of several depths."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from megatron_recursive.data.files import write_json
from megatron_recursive.errors import UserError
from megatron_recursive.figures import aligned

# What the harness says of a wrong command line, with a ValueError or FileNotFoundError.
_MISTAKES = ("Tasks not found", "No tasks specified", "Specify --output_path", "If --samples", "When `fewshot_as",
             "Config file not found", "Invalid YAML")  # fmt: skip
_TOO_LONG = "Invalid configuration: requested max tokens"  # with an AssertionError


def run(words: Sequence[str], depths: Sequence[int]) -> None:
    """Do what the words ask of the harness; with depths at each of them, and then print and write one table."""
    setup_logging(logging.WARNING)  # unless LMEVAL_LOG_LEVEL says otherwise
    logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.getMessage())
    cli = HarnessCLI()
    actions = cli._subparsers.choices
    for parser in (cli._parser, *actions.values()):
        parser.error = _refuse
    args = cli._parser.parse_args(words if words and words[0] in actions else ["run", *words])
    if args.command == "run":
        from megatron_recursive.evaluation import recursive_lm  # noqa: F401  (it registers the model)
    elif depths:
        raise UserError(f"--depths runs tasks, but {args.command} runs none; leave it out.")
    try:
        _at_depths(args, depths) if depths else args.func(args)
    except (ValueError, FileNotFoundError) as error:
        if not str(error).startswith(_MISTAKES):
            raise
        _refuse(str(error))
    except AssertionError as error:
        if not str(error).startswith(_TOO_LONG):
            raise
        sentence = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{sentence}; ask for fewer with --gen_kwargs max_gen_toks=N.") from error


def _refuse(message: str) -> NoReturn:
    sentence = " ".join(message.split()).rstrip(".")
    raise UserError(f"{sentence[:1].upper()}{sentence[1:]}; --help lists what lm-eval takes.")


def _at_depths(args: Any, depths: Sequence[int]) -> None:
    config, records = EvaluatorConfig.from_cli(args), []
    if config.model != "recursive":
        raise UserError(f"--depths sets the depth of --model recursive, but --model is {config.model}.")
    args.output_path = config.output_path or "runs/scores"
    folder = Path(args.output_path).parent if args.output_path.endswith(".json") else Path(args.output_path)
    for depth in depths:
        before = set(folder.rglob("*.json"))
        args.model_args = {**config.model_args, "num_refinement_blocks": depth}
        if config.use_cache is not None:  # which knows an answer by its question alone
            args.use_cache = f"{config.use_cache}_depth{depth}"
        args.func(args)
        for file in set(folder.rglob("*.json")) - before if os.environ.get("RANK", "0") == "0" else ():
            found = json.loads(file.read_text(encoding="utf-8"))
            records.append({"depth": depth, "file": str(file), "results": found["results"],
                            "recursion": found["config"]["recursion"]})  # fmt: skip
    if len(records) == len(depths):  # the first of several processes
        target = file.with_name(f"depths_{file.name.removeprefix('results_')}")
        write_json(target, records)
        print("\n".join([*table(records), str(target)]))


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a task and metric, a column a depth; then the blocks that a token took, and the FLOPs saved."""
    rows = [["task", "metric", *(f"depth {each['depth']}" for each in records)]]
    for task, values in records[0]["results"].items():
        for name, value in values.items():
            metric, _, kept = name.partition(",")
            if kept and not metric.endswith("_stderr") and isinstance(value, float | int):
                cells = [each["results"][task][name] for each in records]
                rows.append([task, metric if kept == "none" else f"{metric} ({kept})",
                             *(f"{cell:.4f}" if abs(cell) < 1e5 else f"{cell:.4g}" for cell in cells)])  # fmt: skip
    for name, key, style in (("blocks a token", "mean_blocks", ".2f"), ("FLOPs saved", "flops_saved", ".1%")):
        rows.append([name, "", *("-" if (n := each["recursion"][key]) is None else f"{n:{style}}" for each in records)])
    return aligned(rows[0], rows[1:], left=2)
