"""``megatron-recursive count``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_recursive import accounting
from megatron_recursive.accounting import ModelShape, mean_flops_per_token
from megatron_recursive.command_line import example
from megatron_recursive.commands import asked, shared
from megatron_recursive.errors import UserError
from megatron_recursive.figures import aligned
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plan.added_parameters import added_parameters
from megatron_recursive.plan.knobs import knobs_in

SUMMARY = "Count a model's parameters, FLOPs and cache by part, and the memory of each rank in a layout."
VERSION = 1  # of the record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.description = (
        "Count parameters by part, held and unrolled; FLOPs of a training step by token, those of passes without "
        "gradient apart; bytes of the cache by token; and the memory of a rank of each pipeline stage."
    )
    model = parser.add_argument_group("model: --model, or Megatron's flags")
    layout = asked.add_model_and_job(parser, model)
    layout.add_argument("--tensor-model-parallel-size", "--tp", type=int, dest="tp", default=1, help="ranks of a layer")
    layout.add_argument("--pipeline-model-parallel-size", "--pp", type=int, dest="pp", default=1, help="stages")
    layout.add_argument("--gpus", type=int, help="how many, the rest data-parallel (default: TP x PP)")
    output = parser.add_argument_group("output")
    shared.add_output(output)
    # fmt: on
    parser.epilog = example("count", "--model", "DIR_OR_CKPT", "--tp", "2", "--pp", "4", "--bf16")


def run(args: argparse.Namespace) -> None:
    asked.check(args)
    shared.finish(args, count(args), tables)


def count(args: argparse.Namespace) -> dict[str, Any]:
    """The record of ``--json``, which section 11 of the guide documents; all figures are those of ``accounting``."""
    from megatron_recursive.pipeline.layouts import layout_of

    model = asked.open_model(args)
    arch, steps = model.arch, asked.steps_as_it_is(model, knobs_in(vars(args)))
    plan, served = steps.own_plan(steps.iterations), steps.served_plan()
    args.gpus = args.gpus or args.tp * args.pp
    args.bf16 = args.bf16 or model.dtype == "bfloat16"
    asked.complete_job(args, model.values)
    shape = arch.shape(args.seq_length, model.rows if model.source == "Hugging Face" else None)
    shape = replace(shape, vocab_size=model.rows)
    cache = accounting.cache_bytes_per_token(shape, served, 4 if model.dtype == "float32" else 2)
    job = asked.job_of(args, arch, steps.deepest, memory=0.0, flops=1.0, pads_vocabulary=args.model is None)
    _refuse_unequal(args, shape)
    found = layout_of(job, args.tp, args.pp)
    return {
        "format": "megatron-recursive count", "version": VERSION,
        "model": {
            "name": args.model or "flags", "source": model.source, "family": plan.family, "layers": arch.num_layers,
            "layers_applied": plan.unrolled_layers(arch.num_layers), "hidden_size": arch.hidden_size,
            "vocabulary": arch.vocab_size, "rows": model.rows, "sequence_length": args.seq_length,
            "passes": plan.num_passes, "passes_with_gradient": len(plan.grad_passes), "dtype": model.dtype,
            "steps": steps.describe(), "plan": json.loads(plan.to_json()),
        },
        "parameters": parameters_of(shape, plan),
        "flops_per_token": flops_of(shape, steps.counts(), served, frozen=bool(model.values.get("lora_rank"))),
        "cache_bytes_per_token": cache,
        "memory": {
            **{name: getattr(found, name) for name in ("tensor", "pipeline", "data", "micro_batches")},
            "micro_batch_size": args.micro_batch_size, "dtype": "bfloat16" if args.bf16 else "float32",
            "bytes_by_stage": [each.parts for each in found.stages],
        },
    }  # fmt: skip


def _refuse_unequal(args: argparse.Namespace, shape: ModelShape) -> None:
    """Name what a layout divides unevenly."""
    data, ragged = divmod(args.gpus, args.tp * args.pp)
    if ragged:
        raise UserError(f"--gpus {args.gpus} is no multiple of --tp {args.tp} x --pp {args.pp}; change one of them.")
    rows = 0 if args.model is None else shape.vocab_size  # those of flags are padded to fit
    for flag, ranks, parts in (
        ("tp", args.tp, {"attention heads": shape.num_attention_heads, "query groups": shape.num_query_groups,
                         "columns of --ffn-hidden-size": shape.ffn_hidden_size, "tokens of --seq-length":
                         shape.seq_length, "rows of the vocabulary": rows}),
        ("pp", args.pp, {"layers": shape.num_layers}),
    ):  # fmt: skip
        for what, number in parts.items():
            if number % ranks:
                raise UserError(f"--{flag} {ranks} does not divide the {number:,} {what} equally; change it.")
    batches, ragged = divmod(args.global_batch_size, data * args.micro_batch_size)
    if ragged or batches < args.pp:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of {data * args.micro_batch_size} "
            f"(--micro-batch-size on {data} data-parallel rank{'s' * (data > 1)}), with a micro-batch for each of the "
            f"{args.pp} stages; change it."
        )


def parameters_of(shape: ModelShape, plan: RecursionPlan) -> dict[str, dict[str, int]]:
    """By part; unrolled, the layers once for every pass through them, as in a plain model of that depth."""
    counted, stacks = accounting.count_parameters(shape, plan), accounting.parameters_by_stack(shape, plan)
    rest = {"final_norm": counted.final_norm, "output_head": counted.output_head}
    rest |= {each.key: each.size(shape.hidden_size) for each in added_parameters(plan) if each.trained}
    return {
        kind: {"embedding": counted.embedding, **{name: sizes[at] for name, sizes in stacks.items()}, **rest,
               "total": getattr(counted, kind)} for at, kind in enumerate(("held", "unrolled"))
    }  # fmt: skip


def flops_of(
    shape: ModelShape, plans: Mapping[RecursionPlan, float], plan: RecursionPlan, *, frozen: bool
) -> dict[str, Any]:
    """Of a training step, the mean over those of a run by their plans; and of inference at the model's own.

    ``attention``: of these, what grows with the sequence: the scores, of which the causal half is counted.
    """
    flops, flat = (mean_flops_per_token(replace(shape, seq_length=length), plans, frozen=frozen)
                   for length in (shape.seq_length, 0))  # fmt: skip
    columns = ("forward", "backward", "attention")
    parts = {
        "grad_free_passes": (flops.grad_free_passes, 0.0, flops.grad_free_passes - flat.grad_free_passes),
        "graded_passes": (flops.graded_forward, flops.passes_backward, flops.graded_passes - flat.graded_passes),
        "vocabulary": (flops.head_forward, flops.head_backward, 0.0),
        "total": (flops.forward, flops.backward, flops.total - flat.total),
    }
    plain = RecursionPlan.plain()
    return {
        **{part: dict(zip(columns, values, strict=True)) for part, values in parts.items()},
        "training": flops.total, "plain_training": accounting.flops_per_token(shape, plain, frozen=frozen).total,
        "inference": accounting.inference_flops(shape, plan),
        "plain_inference": accounting.inference_flops(shape, plain),
    }  # fmt: skip


def tables(record: dict[str, Any]) -> list[str]:
    model, memory, flops, sizes = (record[part] for part in ("model", "memory", "flops_per_token", "parameters"))
    return [
        f"{model['name']}: {model['family']}, {model['layers']} layers of width {model['hidden_size']}, "
        f"{model['layers_applied']} applied in {model['passes']} passes, {model['passes_with_gradient']} with gradient",
        f"vocabulary {model['vocabulary']:,} in {model['rows']:,} rows", *filter(None, [model["steps"]]), "",
        *aligned(["parameters", "held", "unrolled"],
                [[part, f"{size:,}", f"{sizes['unrolled'][part]:,}"] for part, size in sizes["held"].items() if size]),
        "", *aligned([f"MFLOPs a token at {model['sequence_length']:,}", "forward", "backward", "of both, attention"],
                    [[part.replace("_", " "), *(f"{value / 1e6:,.2f}" for value in values.values())]
                     for part, values in flops.items() if isinstance(values, dict)]),
        f"training {flops['training'] / 1e6:,.2f}, inference {flops['inference'] / 1e6:,.2f}; cache "
        f"{record['cache_bytes_per_token']:,} bytes a token in {model['dtype']}",
        "", *aligned([f"GiB a rank, of {memory['pipeline']} stages", *memory["bytes_by_stage"][0]],
                    [[str(stage), *(f"{value / 2**30:.3f}" for value in each.values())]
                     for stage, each in enumerate(memory["bytes_by_stage"])]),
        "TP {tensor} x PP {pipeline} x DP {data}, {micro_batches} micro-batches of {micro_batch_size} in {dtype}; "
        "weights with gradients and Adam's states; computed, not measured".format_map(memory),
    ]  # fmt: skip
