"""``megatron-recursive plot``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from megatron_recursive.accounting import ModelShape, flops_per_token
from megatron_recursive.command_line import example
from megatron_recursive.commands import asked
from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionConfig, RecursionPlan, StepPlans, build_plan
from megatron_recursive.plan.knobs import flag_of, knobs_in
from megatron_recursive.plots.depth_sweep import plot_depth_sweep
from megatron_recursive.plots.layer_scores import plot_layer_scores
from megatron_recursive.plots.loss_curve import AXES, plot_loss_curve, plot_score_by_flops
from megatron_recursive.plots.records import read_record
from megatron_recursive.plots.recursion_plan import plot_plan
from megatron_recursive.plots.schedules import plot_schedules

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
OWNERS: dict[str, tuple[str, ...]] = {"model": OF_FLAGS, "seq_length": OF_FLAGS, "train_iters": ("schedule",),
                                      "seed": ("schedule",), "x": ("runs",), "score": ("flops",)}  # fmt: skip


def add_runs(parser: argparse.ArgumentParser, metavar: str = "RUN", more: str = "") -> None:
    """``metavar`` and ``more``: of a command that takes more words than runs."""
    group = parser.add_argument_group("runs, of which one is required" if not more else "kind, and files or runs")
    group.add_argument("runs", nargs="*", metavar=metavar,
                       help=f"a --save folder, the folder around it, or a metrics.jsonl{more}")  # fmt: skip
    group.add_argument("--metrics", nargs="+", action="extend", default=[], metavar="RUN", help="the same as a flag")


def runs_of(args: argparse.Namespace) -> list[str]:
    if not args.runs + args.metrics:
        raise UserError("RUN is missing; name a run's --save folder or its metrics.jsonl, or several.")
    return [*args.runs, *args.metrics]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.description = "Draw a picture of a kind: " + "; ".join(f"{name} ({what})" for name, what in KINDS.items())
    parser.description += ". A run that is still writing can be drawn too. One that is called as a kind is ./NAME."
    add_runs(parser, "[KIND] FILE", "; of sweep and layers their JSON; of plan and schedule nothing")
    picture = parser.add_argument_group("picture")
    picture.add_argument("--output", metavar="PICTURE", help=".png, .pdf or .svg file (default: beside the file, "
                         "with suffix .png; of several runs comparison.png; or else KIND.png)")
    picture.add_argument("--x", choices=tuple(AXES), help="of runs, what lies along the x axis (default: tokens of "
                         "several runs that all tell them, or else iteration)")
    picture.add_argument("--score", metavar="NAME", help="of flops, a held-out metric as metrics.jsonl calls it "
                         f"(default: {SCORE})")
    model = parser.add_argument_group("model of plan and schedule: the recursion flags, with sizes or --model or alone")
    model.add_argument("--train-iters", type=int, help=f"of schedule: how long the run is (default: {ITERATIONS})")
    model.add_argument("--seed", type=int, help=f"of schedule: the run's, which draws depths (default: {SEED})")
    asked.add_model(parser, model)
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
        plot_score_by_flops(words, output, args.score or SCORE)
    elif kind in OF_FLAGS:
        _draw_described(args, kind, output)
    else:
        output = output if args.output or len(words) > 1 else Path(words[0]).with_suffix(".png")
        records = [read_record(kind, Path(word)) for word in words]
        if kind == "sweep":
            plot_depth_sweep({"models": [model for record in records for model in record["models"]]}, output)
        else:
            plot_layer_scores(records[0], output)
    print(output)


def _check(args: argparse.Namespace, kind: str, words: list[str]) -> None:
    """Flags and files of another kind are refused."""
    given = [name for name in OWNERS if getattr(args, name) is not None]
    for name in (*asked.given_sizes(args), *knobs_in(vars(args)), *given):
        kinds = OWNERS.get(name, OF_FLAGS)
        if kind not in kinds:
            raise UserError(f"{flag_of(name)} belongs to the kind {' or '.join(kinds)}, not to {kind}; leave it out.")
    if kind in OF_FLAGS and words:
        raise UserError(f"The kind {kind} draws no file such as {words[0]}; describe a model by flags or --model.")
    if kind not in OF_FLAGS and not words:
        raise UserError(f"FILE is missing; the kind {kind} draws {KINDS[kind]}.")
    if kind == "layers" and len(words) > 1:
        raise UserError(f"The kind layers draws one file, but {len(words)} are given; draw each by itself.")
    asked.check(argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "seed"}))


def _draw_described(args: argparse.Namespace, kind: str, output: Path) -> None:
    """A plan or its schedules, of the model that flags or --model describe."""
    args.tp, args.bf16, cost, sizes = 1, False, None, ""
    if args.model or asked.given_sizes(args):
        model = asked.open_model(args)
        steps = asked.steps_as_it_is(model, knobs_in(vars(args)))
        config, own, held = steps.config, steps.plan, model.arch.num_layers
        shape = model.arch.shape(args.seq_length or min(4096, model.arch.max_positions), model.rows)
        cost = partial(_cost, shape)
        sizes = f", {held} layers, {own.unrolled_layers(held)} applied, {cost(own):.3g} FLOPs a token"
    else:
        config = RecursionConfig.from_mapping(knobs_in(vars(args))).resolved(embedding_init_std=0.02)
        own = build_plan(config)
    if kind == "plan":
        about = f"{own.family}: {own.num_passes} passes, {len(own.grad_passes)} with gradient{sizes}"
        return plot_plan(own, output, about)
    seed = SEED if args.seed is None else args.seed
    plot_schedules(StepPlans(config, own, seed=seed, iterations=args.train_iters or ITERATIONS), output, cost)


def _cost(shape: ModelShape, each: RecursionPlan) -> float:
    return flops_per_token(shape, each).total
