"""``megatron-recursive plan``."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_recursive.accounting import count_parameters, flops_per_token, mean_flops_per_token, padded_rows
from megatron_recursive.command_line import command, example
from megatron_recursive.commands import asked, shared
from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.knobs import knobs_in

if TYPE_CHECKING:
    from megatron_recursive.pipeline.layouts import Job, Layout

SUMMARY = "Say which layouts of a model fit a number of GPUs, what each needs, and how fast it would be."
UNSAID = ("--norm-epsilon=1e-05", "--init-method-std=0.02", "--rotary-base=10000", "--rotary-percent=1.0",
          "--normalization=LayerNorm", "--position-embedding-type=learned_absolute")  # fmt: skip
COLUMNS = (
    ("TP", "tensor", "3d"), ("PP", "pipeline", "4d"), ("DP", "data", "5d"), ("batches", "micro_batches", "9d"),
    ("weights", "weights_gib", "9.1f"), ("passes", "passes_gib", "8.1f"), ("head", "head_gib", "7.1f"),
    ("total", "total_gib", "7.1f"), ("efficiency", "efficiency", "12.3f"), ("step s", "step_seconds", "9.3g"),
    ("MFU", "mfu", "7.3f"), ("tokens/s", "tokens_per_second", "12,.0f"), ("days", "days", "8.1f"),
)  # fmt: skip
SHOWN = 20  # layouts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.description = (
        "List the tensor x pipeline x data-parallel layouts that fit, the fastest first, with the memory of the "
        "fullest rank and the simulated efficiency of the pipeline, and print the line that trains in the first."
    )
    required = parser.add_argument_group("required")
    required.add_argument("--gpus", type=int, required=True, help="how many")
    model = parser.add_argument_group("model: --model, or Megatron's flags")
    job = asked.add_model_and_job(parser, model)
    job.add_argument("--tokens", metavar="N", help="also tell the days that so many take: 100B, 300M, ...")
    gpus = parser.add_argument_group("GPUs")
    gpus.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of each; 90%% of it may be filled")
    gpus.add_argument("--gpus-per-node", type=int, default=8, help="most ranks of a tensor-parallel group")
    gpus.add_argument("--mfu", type=float, default=0.4, help="share of its peak that a GPU reaches while it computes")
    gpus.add_argument("--peak-tflops", type=float, help="of a GPU (default: an H100's, 989 in bf16 and 67 in fp32)")
    gpus.add_argument("--tensor-model-parallel-size", "--tp", type=int, dest="tp", help="only layouts of this size")
    gpus.add_argument("--pipeline-model-parallel-size", "--pp", type=int, dest="pp", help="only layouts of this size")
    output = parser.add_argument_group("output")
    output.add_argument("--timeline", metavar="PICTURE",
                        help="simulate a step of the best layout with stages, and draw it: .png, .pdf or .svg")
    shared.add_output(output)
    # fmt: on
    parser.epilog = example("plan", "--gpus", "64", "--num-layers", "32", "--hidden-size", "4096", "--tokens", "100B",
                            "--num-attention-heads", "32", "--swiglu", "--bf16",
                            "--use-distributed-optimizer")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    asked.check(args)
    model, tokens = asked.open_model(args), _count(args.tokens)
    asked.complete_job(args, model.values)
    args.peak_tflops = args.peak_tflops or (989.0 if args.bf16 else 67.0)
    arch, recursion = model.arch, asked.recursion_of(model, knobs_in(vars(args)), trains=True)
    from megatron_recursive.pipeline.layouts import GIB, fitting_layouts, what_would_fit

    flops = args.peak_tflops * 1e12 * args.mfu
    shared_by, batch = recursion.num_supervision_steps, args.global_batch_size * args.seq_length
    iterations = shared_by * -(-int(tokens) // batch) if tokens else None
    steps = asked.steps_of(arch, recursion, iterations)
    plan = steps.own_plan(steps.iterations)
    job = asked.job_of(args, arch, steps.deepest, memory=args.gpu_memory * GIB, flops=flops, node=args.gpus_per_node,
                 pads_vocabulary=args.model is None)  # fmt: skip
    fitting = fitting_layouts(job)
    if not fitting:
        raise UserError(what_would_fit(job))
    found = [x for x in fitting if args.tp in (None, x.tensor) and args.pp in (None, x.pipeline)]
    if not found:
        sizes = ", ".join(f"{x.tensor} x {x.pipeline}" for x in fitting[:8])
        raise UserError(f"No layout of these --tp and --pp fits; those that do have TP x PP of {sizes}.")
    shape = job.shape
    if job.pads_vocabulary:
        shape = replace(shape, vocab_size=padded_rows(shape.vocab_size, found[0].tensor))
    parameters, flops = count_parameters(shape, plan), mean_flops_per_token(shape, steps.counts()).total
    share = flops / flops_per_token(shape, job.plan).total  # of the time of the deepest step
    found = [replace(each, seconds=each.seconds * share) for each in found]
    report = {
        "layers": arch.num_layers, "width": arch.hidden_size, "passes": plan.num_passes,
        "passes_with_gradient": len(plan.grad_passes), "steps": steps.describe(), "parameters_held": parameters.held,
        "parameters_unrolled": parameters.unrolled, "flops_per_token": flops, "assumed_mfu": args.mfu,
        "assumed_peak_tflops": args.peak_tflops,
        "layouts": [_figures(args, job, x, flops, tokens, shared_by) for x in found],
        "command": command("pretrain", *_words(args, model, job, recursion, found[0], iterations)),
    }  # fmt: skip
    text = _text(args, job, report, recursion)
    if args.timeline:
        from megatron_recursive.pipeline.planner import plan_pipeline
        from megatron_recursive.plots.pipeline_timeline import described, plot_timeline

        best = next((x for x in found if x.pipeline > 1), found[0])
        step = best.pipeline, best.micro_batches, job.shape, job.backward_cost
        timeline, simulated = plan_pipeline(job.plan, *step, job.window, best.split)
        picture = str(plot_timeline(timeline, job.plan, args.timeline))
        report["timeline"] = {**simulated, "picture": picture}
        text += [described(timeline, job.plan, simulated), "", picture, ""]
    donor = model.source == "Hugging Face"
    start = f", from the checkpoint CKPT of convert import --hf {args.model}" if donor else ""
    text += [f"The first layout{start}, with your own words for those in capitals:", str(report["command"])]
    shared.finish(args, report, lambda _: text)


def _count(text: str | None) -> float | None:
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    if text is None:
        return None
    try:
        number = float(text[:-1]) * units[text[-1].upper()] if text[-1:].isalpha() else float(text)
    except (ValueError, KeyError):
        number = 0.0
    if not 1 <= number < 1e18:
        raise UserError(f"--tokens {text} must be a positive number such as 300M, 100B or 1.5T.")
    return number


def _figures(
    args: argparse.Namespace, job: Job, layout: Layout, flops: float, tokens: float | None, shared_by: int
) -> dict[str, Any]:
    """``shared_by``: so many steps read one batch, whose tokens count once."""
    from megatron_recursive.pipeline.layouts import GIB

    speed = job.tokens_per_step / layout.seconds
    return {
        "tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data,
        "micro_batches": layout.micro_batches, "layers_per_stage": layout.split,
        "fullest_stage": layout.stage,
        **{f"{part}_gib": size / GIB for part, size in layout.memory.parts.items()},
        "efficiency": layout.efficiency, "step_seconds": layout.seconds,
        "tokens_per_second": speed / shared_by, "mfu": speed * flops / (job.gpus * args.peak_tflops * 1e12),
        "days": tokens * shared_by / speed / 86400 if tokens else None,
    }  # fmt: skip


def _text(args: argparse.Namespace, job: Job, report: dict[str, Any], recursion: RecursionConfig) -> list[str]:
    from megatron_recursive.pipeline.layouts import TENSOR_COST, USABLE, stage_costs
    from megatron_recursive.pipeline.planner import said_of_phases

    columns, shared_by = COLUMNS if args.tokens else COLUMNS[:-1], recursion.num_supervision_steps
    share = f"{shared_by} steps{' at most' * recursion.carry_halted} share"
    about = [
        f"{report['layers']} layers of width {report['width']}, {report['passes']} pass{'es' * (report['passes'] > 1)} "
        f"({report['passes_with_gradient']} with gradient): {report['parameters_held'] / 1e6:,.0f} M parameters held, "
        f"{report['parameters_unrolled'] / 1e6:,.0f} M unrolled, {report['flops_per_token'] / 1e9:,.2f} GFLOPs a token",
        f"{job.gpus} GPUs of {args.gpu_memory:g} GiB ({USABLE:.0%} may be filled), {'bf16' if args.bf16 else 'fp32'}; "
        f"a step of {job.global_batch} x {args.seq_length:,} tokens in micro-batches of {args.micro_batch_size}"
        + f", which {share}: tokens/s and days are of the data" * (shared_by > 1),
        *(f"{steps}; memory is of the deepest step, time of the mean one" for steps in [report["steps"]] if steps),
    ]
    rows = ["".join(f"{name:>{form.partition('.')[0].rstrip('d,')}}" for name, _, form in columns)]
    rows += ["".join(f"{each[key]:{form}}" for _, key, form in columns) for each in report["layouts"][:SHOWN]]
    rows += [f"and {len(report['layouts']) - SHOWN} more (--json)"] if len(report["layouts"]) > SHOWN else []
    notes = [
        "batches: micro-batches of each pipeline in a step. GiB of the fullest rank, computed and not measured: "
        "weights with gradients and Adam's states; what recorded passes keep; head, the logits or a pass's replay.",
        f"Assumed: a GPU reaches {args.mfu:.0%} of {args.peak_tflops:g} TFLOPS while it computes (--mfu, "
        "--peak-tflops). Simulated: how long stages wait (efficiency; MFU is what remains). Communication is not "
        f"simulated; every doubling of TP is charged {TENSOR_COST:.0%}.",
    ]
    ring = next((each for each in report["layouts"] if each["pipeline"] > 1), None)
    if ring and not job.plan.is_plain:
        costs = stage_costs(job, ring["pipeline"])
        said = said_of_phases(costs, ring["micro_batches"], window=job.window)
        split = ring["layers_per_stage"]
        layers = f" of {', '.join(map(str, split))} layers" if len(set(split)) > 1 else ""
        notes.append(f"{ring['micro_batches']} micro-batches on {ring['pipeline']} stages{layers}: {said}.")
    about, notes = ([textwrap.fill(line, 100, subsequent_indent="  ") for line in lines] for lines in (about, notes))
    return [*about, "", *rows, "", *notes, ""]


def _words(
    args: argparse.Namespace, model: asked.Model, job: Job, recursion: RecursionConfig, layout: Layout,
    iterations: int | None,
) -> list[str]:  # fmt: skip
    """The flags of a run in a layout, to be given on each node."""
    from megatron_recursive.pipeline.balance import split_flags

    arch, values = model.arch, model.values
    node, unsaid, steps = min(job.node, job.gpus), set(UNSAID), recursion.num_supervision_steps
    nodes = [f"--nnodes={job.gpus // node}", "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:29500"]
    if job.pads_vocabulary:  # the model is that of flags, and what they leave out is as in training
        unsaid |= {f"--padded-vocab-size={arch.padded_vocab_size}", "--no-bias-gelu-fusion"}
    switches = {
        "--sequence-parallel": layout.tensor > 1,
        "--bf16": args.bf16,
        f"--pipeline-window={args.pipeline_window}": args.pipeline_window and layout.pipeline > 1,
        "--use-distributed-optimizer": args.use_distributed_optimizer,
        "--recompute-passes": args.recompute_passes,
        "--recompute-granularity=full --recompute-method=uniform --recompute-num-layers=1": args.recompute_granularity,
        f"--load={args.model if model.source == 'checkpoint' else 'CKPT'}": args.model,
    }
    return [
        f"--nproc-per-node={node}", *(nodes if job.gpus > node else []),
        f"--tensor-model-parallel-size={layout.tensor}", f"--pipeline-model-parallel-size={layout.pipeline}",
        *split_flags(layout.split),
        *(word for flags, on in switches.items() if on for word in flags.split()),
        f"--micro-batch-size={args.micro_batch_size}", f"--global-batch-size={job.global_batch}",
        f"--seq-length={args.seq_length}", *(flag for flag in arch.megatron_flags() if flag not in unsaid),
        *(flag for flag in recursion.flags() if flag not in RecursionConfig().flags()),
        "--hidden-dropout=0", "--attention-dropout=0", "--lr=3e-4",
        f"--train-iters={iterations or -(-max(1000, *(recursion.deep_supervision_warmup or (0,))) // steps) * steps}",
        "--data-path=DATA", "--split=949,50,1", "--save=SAVE",
        f"--save-interval={-(-1000 // steps) * steps}",  # a run stops within no batch
        f"--tokenizer-type={values.get('tokenizer_type') or 'HuggingFaceTokenizer'}",
        f"--tokenizer-model={values.get('tokenizer_model') or 'TOKENIZER'}",
    ]  # fmt: skip
