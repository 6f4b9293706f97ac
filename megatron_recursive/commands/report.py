"""``megatron-recursive report``."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_recursive.command_line import command, example
from megatron_recursive.commands import count, generate, health, parser_of, sweep
from megatron_recursive.commands.evaluate import depth_list

if TYPE_CHECKING:
    from megatron_recursive.report.subjects import Subject

SUMMARY = "Write one page about runs or models: is the recursion used, what does depth buy, what does it cost."
TOKENS = 24  # of a sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.description = (
        "Write one HTML file of the training, and of what sweep, health, layers, evaluate and generate have written into "
        "the folder of a run or a model. It says which command would make what is not there, and measures nothing "
        "itself unless --measure asks."
    )
    given = parser.add_argument_group("runs and models, of which one is required")
    given.add_argument("runs", nargs="+", metavar="RUN_OR_MODEL", help="a --save folder, the folder around it, a "
                       "metrics.jsonl, a checkpoint or a Hugging Face folder; several stand side by side")
    given.add_argument("--results", nargs="+", default=[], metavar="PATH", help="further files or folders of results")
    measures = parser.add_argument_group("measuring, on --text")
    measures.add_argument("--measure", action="store_true", help="run sweep and health first where their JSON is missing")
    measures.add_argument("--depths", type=depth_list, metavar="T,T,...",
                          help="of the sweep (default: powers of 2 up to twice the trained depth)")
    measures.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                          help="with --measure also what each block says behind it; may be given several times")
    sweep.add_held_out(parser)
    parser.set_defaults(num_samples=16)
    rest = parser.add_argument_group("tokenizer, device and output")
    rest.add_argument("--tokenizer", metavar="DIR", help="a folder, or a hub name (default: the model's)")
    rest.add_argument("--device", choices=generate.DEVICES, help=generate.DEVICE_HELP)
    rest.add_argument("--output", metavar="FILE", help="the page (default: report.html in the folder of the first)")
    rest.add_argument("--json", action="store_true", help="print the answers as JSON")
    # fmt: on
    parser.epilog = example("report", "runs/default", "--measure", "--prompt", "The function returns")


def run(args: argparse.Namespace) -> None:
    generate.prepare_transformers()
    from megatron_recursive.data.files import replacing
    from megatron_recursive.report.answers import answers
    from megatron_recursive.report.page import render
    from megatron_recursive.report.subjects import find_subjects

    subjects, compared = find_subjects(args.runs, args.results)
    missing: dict[str, str] = {}
    for each in subjects:
        if each.model is not None:
            _count(each)
            makers = _makers(each)
            if args.measure:
                _measure(args, each, makers)
            missing |= {f"{kind} of {each.name}": command(*words) for kind, words in makers.items()
                        if kind not in each.found}  # fmt: skip
    output = Path(args.output or subjects[0].folder / "report.html")
    with replacing(output) as (partial,):
        partial.write_text(render(subjects, compared, missing), encoding="utf-8")
    said = {each.given: [answer._asdict() for answer in answers(each)] for each in subjects}
    lines = [f"{name}: {each['question']} {each['said']}" for name, found in said.items() for each in found]
    print(json.dumps(said) if args.json else "\n".join([*lines, str(output)]))


def _count(subject: Subject) -> None:
    asked = parser_of("count").parse_args(["--model", str(subject.model)])
    model = count.open_model(asked)
    subject.plan = subject.plan or model.steps.own_plan(model.steps.iterations)
    subject.found["count"] = count.count(asked, model)


def _makers(subject: Subject) -> dict[str, list[str]]:
    """By kind of record, the command that makes it."""
    model, place = str(subject.model), subject.folder
    made = {kind: [kind, "--model", model, "--output", str(place / f"{kind}.json")] for kind in ("sweep", "health", "layers")}
    made["scores"] = shlex.split(f"evaluate --model recursive --tasks hellaswag --output_path {place / 'scores'}")
    made["scores"] += ["--model_args", f"pretrained={model}"]
    if subject.plan is not None and subject.plan.is_plain:
        del made["health"]
    else:
        made["samples"] = ["report", subject.given, "--measure", "--prompt", "Once upon a time"]
    return made


def _measure(args: argparse.Namespace, subject: Subject, makers: dict[str, list[str]]) -> None:
    from megatron_recursive.data.files import replacing
    from megatron_recursive.report.subjects import collect

    trained = subject.plan.depth if subject.plan is not None else 1
    depths = args.depths or tuple(2**n for n in range((2 * trained).bit_length()))
    for kind, module in (("sweep", sweep), ("health", health)):
        if kind in makers and kind not in subject.found:
            asked = parser_of(kind).parse_args(makers[kind][1:])
            given = {name: value for name, value in vars(args).items() if name not in ("output", "json")}
            vars(asked).update({name: value for name, value in given.items() if name in vars(asked)}, depths=depths)
            module.measure(asked)
            collect(subject, [Path(asked.output)], at_home=True)
    if args.prompt and "samples" in makers:
        words = ["--model", str(subject.model), "--show-recursive-steps", "--json", "--max-tokens", str(TOKENS)]
        words += [word for prompt in args.prompt for word in ("--prompt", prompt)]
        asked, file = parser_of("generate").parse_args(words), subject.folder / "samples.jsonl"
        vars(asked).update(tokenizer=args.tokenizer, device=args.device)
        with replacing(file) as (partial,), partial.open("w") as stream, contextlib.redirect_stdout(stream):
            generate.run(asked)
        collect(subject, [file], at_home=True)
