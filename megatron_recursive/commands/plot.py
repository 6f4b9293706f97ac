"""``megatron-recursive plot``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_recursive.command_line import example
from megatron_recursive.errors import UserError
from megatron_recursive.plots.loss_curve import AXES, plot_loss_curve

if TYPE_CHECKING:
    from megatron_recursive.plan import RecursionPlan, StepPlans
    from megatron_recursive.plots.schedules import Cost

SUMMARY = "Draw runs, a plan, schedules, or what sweep and layers measured, into a picture."
KINDS = {
    "runs": "the losses of runs, which is meant where no kind is given",
    "plan": "the passes of the model that flags or --model describe: by block and stack, with gradient, supervised",
    "schedule": "depth, gradient and supervision of each training step, and deep supervision's three schedules",
    "sweep": "JSON of the command sweep, of several files together",
    "layers": "JSON of the command layers",
    "flops": "held-out scores of runs against the FLOPs that they spent, at the depths that were drawn",
}
OF_FLAGS, ITERATIONS, SEED, SCORE = ("plan", "schedule"), 1000, 1234, "lm loss"


def add_runs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runs, of which one is required")
    group.add_argument("runs", nargs="*", metavar="RUN",
                       help="a --save folder, the folder around it, or a metrics.jsonl")  # fmt: skip
    group.add_argument("--metrics", nargs="+", action="extend", default=[], metavar="RUN", help="the same as a flag")


def runs_of(args: argparse.Namespace) -> list[str]:
    if not args.runs + args.metrics:
        raise UserError("RUN is missing; name a run's --save folder or its metrics.jsonl, or several.")
    return [*args.runs, *args.metrics]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    from megatron_recursive.commands.plan import add_model

    parser.description = "Draw a picture of one of these kinds: " + "; ".join(f"{k} ({v})" for k, v in KINDS.items())
    parser.description += ". A run that is still writing can be drawn too. A run called as a kind is ./NAME."
    files = parser.add_argument_group("kind, and files or runs")
    files.add_argument("runs", nargs="*", metavar="[KIND] FILE", help="a kind, and what it draws: a run is a --save "
                       "folder, the folder around it, or a metrics.jsonl; plan and schedule take none")
    files.add_argument("--metrics", nargs="+", action="extend", default=[], metavar="RUN", help="runs as a flag")
    picture = parser.add_argument_group("picture")
    picture.add_argument("--output", metavar="PICTURE", help=".png, .pdf or .svg file (default: beside the file, "
                         "with suffix .png; of several runs comparison.png; or else KIND.png)")
    picture.add_argument("--x", choices=tuple(AXES), help="of runs, what lies along the x axis (default: tokens of "
                         "several runs that all tell them, or else iteration)")
    picture.add_argument("--score", metavar="NAME", help=f"of flops, a held-out metric by its name in metrics.jsonl "
                         f"(default: {SCORE})")
    model = parser.add_argument_group("model of plan and schedule: the recursion flags alone, sizes too, or --model")
    model.add_argument("--model", metavar="DIR_OR_CKPT", help="as count takes it; a model's sizes also tell its FLOPs")
    model.add_argument("--train-iters", type=int, help=f"of schedule: how long the run is (default: {ITERATIONS})")
    model.add_argument("--seed", type=int, help=f"of schedule: of the run, which draws depths (default: {SEED})")
    add_model(parser, model)
    # fmt: on
    parser.epilog = example("plot", "runs/default", "runs/plain", "--x", "flops")


def run(args: argparse.Namespace) -> None:
    words = runs_of(args)
    kind = words.pop(0) if words[0] in KINDS and words != ["runs"] else "runs"
    _check(args, kind, words)
    output = Path(args.output or f"{kind}.png")
    if kind == "runs":
        output = plot_loss_curve(words, args.output, args.x)
    elif kind == "flops":
        from megatron_recursive.plots.score_by_flops import plot_score_by_flops

        plot_score_by_flops(words, output, args.score or SCORE)
    elif kind in OF_FLAGS:
        steps, cost, about = _described(args)
        if kind == "plan":
            from megatron_recursive.plots.recursion_plan import plot_plan

            plot_plan(steps.plan, output, about)
        else:
            from megatron_recursive.plots.schedules import plot_schedules

            plot_schedules(steps, output, cost)
    else:
        output = _of_json(kind, words, args.output)
    print(output)


def _check(args: argparse.Namespace, kind: str, words: list[str]) -> None:
    """Flags and files of another kind are refused."""
    from megatron_recursive.commands.plan import check, given_sizes
    from megatron_recursive.plan.knobs import flag_of, knobs_in

    of_model = [*given_sizes(args), *knobs_in(vars(args))]
    of_model += [name for name in ("model", "train_iters", "seed", "seq_length") if getattr(args, name) is not None]
    if kind not in OF_FLAGS and of_model:
        raise UserError(f"{flag_of(of_model[0])} belongs to the kinds plan and schedule, not to {kind}; leave it out.")
    for flag, value, owner in (("--x", args.x, "runs"), ("--score", args.score, "flops")):
        if value is not None and kind != owner:
            raise UserError(f"{flag} belongs to the kind {owner}, not to {kind}; leave it out.")
    if kind in OF_FLAGS and words:
        raise UserError(f"The kind {kind} draws no file such as {words[0]}; describe a model by flags or --model.")
    if kind not in OF_FLAGS and not words:
        raise UserError(f"FILE is missing; the kind {kind} draws {KINDS[kind]}.")
    check(argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "seed"}))


def _described(args: argparse.Namespace) -> tuple[StepPlans, Cost | None, str]:
    """The steps of the model, what a token of a plan costs where sizes are known, and what to say above."""
    from megatron_recursive.accounting import flops_per_token
    from megatron_recursive.commands import count
    from megatron_recursive.commands.plan import given_sizes
    from megatron_recursive.plan import RecursionConfig, StepPlans, build_plan
    from megatron_recursive.plan.knobs import knobs_in

    args.train_iters, args.seed = args.train_iters or ITERATIONS, SEED if args.seed is None else args.seed
    args.tp, args.bf16, cost, size = 1, False, None, ""
    if args.model or given_sizes(args):
        model = count.open_model(args)
        steps, length = model.steps, args.seq_length or min(4096, model.arch.max_positions or 4096)
        shape = model.arch.shape(length, model.rows if model.source == "Hugging Face" else None)

        def cost(plan: RecursionPlan) -> float:
            return flops_per_token(shape, plan).total

        applied = steps.plan.unrolled_layers(model.arch.num_layers)
        size = f", {model.arch.num_layers} layers, {applied} applied, {cost(steps.plan):.3g} FLOPs a token"
    else:
        config = RecursionConfig.from_mapping(knobs_in(vars(args))).resolved(embedding_init_std=0.02)
        steps = StepPlans(config, build_plan(config), seed=args.seed, iterations=args.train_iters)
    plan = steps.plan
    about = f"{plan.family}: {plan.num_passes} passes, {len(plan.grad_passes)} with gradient{size}"
    return steps, cost, "\n".join(filter(None, [about, steps.describe()]))


def _of_json(kind: str, files: list[str], output: str | None) -> Path:
    records = [_read(kind, Path(file)) for file in files]
    picture = Path(output) if output else Path(files[0]).with_suffix(".png") if len(files) == 1 else Path(f"{kind}.png")
    if kind == "sweep":
        from megatron_recursive.plots.depth_sweep import plot_depth_sweep

        plot_depth_sweep({"models": [model for record in records for model in record["models"]]}, picture)
        return picture
    from megatron_recursive.plots.layer_scores import plot_layer_scores

    if len(files) > 1:
        raise UserError(f"The kind layers draws one file, but {len(files)} are given; draw {files[1]} by itself.")
    plot_layer_scores(records[0], picture)
    return picture


def _read(kind: str, file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); name the JSON of the command {kind}") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON; name what the command {kind} has written") from error
    wanted = {"format": f"megatron-recursive {kind}", "version": 1}
    found = {name: record.get(name) for name in wanted} if isinstance(record, dict) else {}
    if found != wanted:
        raise UserError(f"{file} is no JSON of the command {kind} in version 1; name what {kind} has written")
    return dict(record)
