"""``megatron-recursive report``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_recursive.command_line import command, example
from megatron_recursive.commands import count, module_of, parser_of, shared
from megatron_recursive.plan import RecursionPlan

if TYPE_CHECKING:
    from megatron_recursive.report.subjects import Subject

SUMMARY = "Write one page about runs or models: is the recursion used, what does depth buy, what does it cost."
MAKERS = {  # kind of record -> the command that makes it, of MODEL in FOLDER
    "sweep": "sweep --model MODEL --output FOLDER/sweep.json",
    "health": "health --model MODEL --output FOLDER/health.json",
    "layers": "layers --model MODEL --output FOLDER/layers.json",
    "samples": "report FOLDER --measure --prompt TEXT",
    "scores": "evaluate --model MODEL --tasks hellaswag --output FOLDER/scores",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.description = (
        "Write one HTML file of the training, and of what sweep, health, layers, evaluate and generate have left in "
        "the folder of a run or a model. It says which command would make what is not there, and measures nothing "
        "itself unless --measure asks."
    )
    given = parser.add_argument_group("runs and models, of which one is required")
    given.add_argument("runs", nargs="+", metavar="RUN_OR_MODEL", help="a --save folder, the folder around it, a "
                       "metrics.jsonl, a checkpoint or a Hugging Face folder; several stand side by side")
    asked = parser.add_argument_group("measuring")
    asked.add_argument("--measure", action="store_true", help="first run sweep and health, where they have not run yet")
    asked.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                       help="with --measure: what each block says behind it; may be given several times")
    shared.add_held_out(parser)
    parser.set_defaults(num_samples=16)
    rest = parser.add_argument_group("tokenizer, device and output")
    shared.add_tokenizer(rest)
    shared.add_device(rest)
    rest.add_argument("--output", metavar="FILE", help="the page (default: report.html in the folder of the first)")
    rest.add_argument("--json", action="store_true", help="print the answers as one JSON object")
    # fmt: on
    parser.epilog = example("report", "runs/default", "--measure", "--prompt", "The function returns")


def run(args: argparse.Namespace) -> None:
    shared.prepare_transformers()
    from megatron_recursive.data.files import replacing
    from megatron_recursive.report.answers import answers
    from megatron_recursive.report.page import render
    from megatron_recursive.report.subjects import find_subjects

    subjects, compared = find_subjects(args.runs)
    missing: dict[str, str] = {}
    for each in subjects:
        if each.model is None:
            missing[f"weights of {each.name}"] = f"{each.folder} holds none"
            continue
        asked = parser_of("count").parse_args(["--model", each.model])
        counted = count.count(asked)
        each.plan = each.plan or RecursionPlan.from_json(json.dumps(counted["model"]["plan"]))
        if args.measure:
            _measure(args, each)
        each.found["count"] = counted
        for kind in MAKERS.keys() - each.found.keys() - ({"health", "samples"} if each.is_plain else set()):
            line = MAKERS[kind].replace("MODEL", str(each.model)).replace("FOLDER", str(each.folder))
            missing[f"{kind} of {each.name}"] = command(*line.split())
    output = Path(args.output or subjects[0].folder / "report.html")
    with replacing(output) as (partial,):
        partial.write_text(render(subjects, compared, dict(sorted(missing.items()))), encoding="utf-8")
    said = {each.given: [answer._asdict() for answer in answers(each)] for each in subjects}
    lines = [f"{name}: {each['question']} {each['said']}" for name, found in said.items() for each in found]
    print(json.dumps(said) if args.json else "\n".join([*lines, str(output)]))


def _measure(args: argparse.Namespace, subject: Subject) -> None:
    """Run the commands that make what is not there; what they print is left out, or else the samples."""
    from megatron_recursive.data.files import replacing

    assert subject.plan is not None
    depths = [2**n for n in range((2 * subject.plan.depth).bit_length())]  # up to twice the trained one
    words = {kind: ["--output", str(subject.folder / f"{kind}.json")] for kind in ("sweep", "health")}
    words["sweep"] += ["--depths", ",".join(map(str, depths))]
    words["generate"] = ["--show-recursive-steps", "--json", "--max-tokens", "24"]
    words["generate"] += [word for prompt in args.prompt for word in ("--prompt", prompt)]
    for kind in ("sweep",) if subject.is_plain else ("sweep", "health", *["generate"] * bool(args.prompt)):
        if kind not in subject.found:
            asked = parser_of(kind).parse_args(["--model", str(subject.model), *words[kind]])
            alike = vars(args).keys() & vars(asked).keys() - {"output", "json", "prompt"}
            alike -= {"batch_size"} if kind == "generate" else set()
            vars(asked).update({name: vars(args)[name] for name in alike})
            with contextlib.redirect_stdout(io.StringIO()) as said:
                module_of(kind).run(asked)
            if kind == "generate":
                with replacing(subject.folder / "samples.jsonl") as (partial,):
                    partial.write_text(said.getvalue(), encoding="utf-8")
    subject.collect()
