"""Simulate a step of a recursive model on pipeline stages: timeline, idle time, efficiency, activations, messages."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings

from megatron_recursive.accounting import ModelShape
from megatron_recursive.errors import report_user_errors
from megatron_recursive.plan import RecursionConfig, build_plan
from megatron_recursive.plan.recursion_config import add_recursion_arguments
from megatron_recursive.plots.pipeline_timeline import plot_timeline, report_text, text_columns, text_timeline

MAX_ROWS, MAX_TEXT_RANKS = 64, 16  # a picture of more ranks shows every n-th


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pp", type=int, required=True, help="pipeline stages")
    parser.add_argument("--micro-batches", type=int, required=True, help="micro-batches per step on a pipeline")
    parser.add_argument("--pipeline-phases", choices=("auto", "one", "two"), default="auto", help="as in training")
    parser.add_argument("--two-phase", dest="pipeline_phases", action="store_const", const="two", help="phases: two")
    parser.add_argument("--num-layers", type=int, help="default: 4 per stage, or the sum of --layers-per-stage")
    parser.add_argument("--layers-per-stage", type=int, nargs="+", help="default: equally many")
    for name, default in (("hidden-size", 1024), ("ffn-hidden-size", None), ("num-attention-heads", 16),
                          ("vocab-size", 32768), ("seq-length", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default or '4 x hidden size'}")
    parser.add_argument("--swiglu", action="store_true", help="gated MLP")
    parser.add_argument("--unit-costs", action="store_true", help="equal passes: no vocabulary head, no model needed")
    parser.add_argument("--backward-cost", type=float, default=2.0,
                        help="backward of a layer, in forwards (default: 2; 3 with full recompute)")
    parser.add_argument("--output", metavar="PICTURE", help="also draw the timeline: .png, .pdf or .svg")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return add_recursion_arguments(parser).parse_args()


def shape_of(args: argparse.Namespace) -> ModelShape | None:
    if args.unit_costs:
        return None
    layers = args.num_layers or sum(args.layers_per_stage or [4 * args.pp])
    hidden, heads = args.hidden_size, args.num_attention_heads
    return ModelShape(layers, hidden, args.ffn_hidden_size or 4 * hidden, heads, heads, hidden // heads,
                      args.vocab_size, args.seq_length, gated_linear_unit=args.swiglu)  # fmt: skip


def show_progress(share: float) -> None:
    if sys.stderr.isatty():
        print(f"simulating: {share:4.0%}", end="\r", file=sys.stderr, flush=True)


@report_user_errors
def main() -> None:
    args = parse_args()
    warnings.simplefilter("ignore")  # Megatron and torch list what they do not find
    logging.disable(logging.WARNING)
    from megatron_recursive.pipeline.planner import Pipeline, plan_pipeline

    plan = build_plan(RecursionConfig.from_mapping(vars(args)).resolved(embedding_init_std=0.02))
    pipeline = Pipeline(plan, args.pp, args.micro_batches, shape_of(args),
                        tuple(args.layers_per_stage) if args.layers_per_stage else None,
                        args.backward_cost, args.pipeline_phases)  # fmt: skip
    timeline, report = plan_pipeline(pipeline, show_progress)
    if not args.json and args.pp <= MAX_TEXT_RANKS:
        rows = timeline.sample(range(args.pp), text_columns(timeline.makespan))
        print(text_timeline(rows, range(args.pp), plan, timeline.makespan), end="\n\n")
    print(json.dumps(report) if args.json else report_text(report))
    if args.output:
        ranks = range(0, args.pp, -(-args.pp // MAX_ROWS))
        title = (f"{args.pp} stages, {args.micro_batches} micro-batches, {plan.num_passes} passes: "
                 f"efficiency {timeline.efficiency:.3f}")  # fmt: skip
        drawn = plot_timeline(list(map(timeline.boxes, ranks)), ranks, plan, title, args.output)
        print(drawn, file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    main()
