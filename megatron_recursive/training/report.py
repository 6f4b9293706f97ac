"""What a run says about its recursion before it starts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from megatron_recursive.accounting import FlopsPerToken, count_parameters
from megatron_recursive.models.layer_specs import layers_of_stages
from megatron_recursive.pipeline.balance import said_of_balance
from megatron_recursive.pipeline.planner import said_of_phases
from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.knobs import flag_of
from megatron_recursive.training import console
from megatron_recursive.training.memory_report import carried_bytes
from megatron_recursive.training.model_provider import RecursiveGPTModelConfig, model_shape, training_flops

# The flags of a recursion that are no knobs, and their defaults.
OF_RUNS = {"recompute_passes": False, "pipeline_phases": "auto", "pipeline_window": 0,
           "override_recursion_depth": False}  # fmt: skip


def announce(args: argparse.Namespace, config: RecursiveGPTModelConfig) -> dict[str, Any]:
    """Rank 0 prints the passes, which carry gradient, and the figures of :func:`run_description`, which it returns."""
    plan, shape, plans = config.plan, model_shape(config, args.seq_length), config.step_plans(args)
    flops = training_flops(config, args.seq_length, plans.counts())
    description = run_description(args, config, flops)
    if args.rank != 0:
        return description
    phases = teacher = ""
    if config.distillation is not None:
        teacher = f"\ndistillation: {config.distillation.describe(args)}"
    if args.pipeline_model_parallel_size > 1 and not plan.is_plain:
        batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        costs = config.transformer.pipeline_costs(plan)
        said = said_of_phases(costs, batches, args.pipeline_phases, args.pipeline_window)
        balance = said_of_balance(plan, shape, layers_of_stages(config.transformer))
        phases = f"\npipeline: {'; '.join(filter(None, (said, balance)))}"
    phases += _said_of_carried(args, config) + _said_of_idle(args, config)
    steps, mean = (f"\n{plans.describe()}", ", the mean of all steps") if plans.changes else ("", "")
    path = console.log_path()
    if path is not None:
        console.say(f"log: {path.parent} (all that Megatron and the libraries below it say, a file a rank)")
    console.say(
        f"model: {shape.num_layers} layers of width {shape.hidden_size}, {shape.num_attention_heads} heads, vocabulary "
        f"{shape.vocab_size:,}\n{args.world_size} ranks: tensor {args.tensor_model_parallel_size} x pipeline "
        f"{args.pipeline_model_parallel_size} x data {args.data_parallel_size} | a step: {args.global_batch_size:,} "
        f"sequences of {args.seq_length:,} tokens\n"
        f"------------------------ recursion plan: {plan.family} ------------------------\n{plan.describe()}\n"
        f"passes: {plan.num_passes}, with gradient: {len(plan.grad_passes)} | "
        f"state init: {plan.state_init} | state norm: {plan.state_norm} | "
        f"embedding multiplier: {plan.embedding_multiplier:g}\n"
        f"parameters: held {description['parameters held']:,}, unrolled {description['parameters unrolled']:,} | "
        f"FLOPs per token: {flops.total:.4g} (forward {flops.forward:.4g}, backward {flops.backward:.4g}{mean})"
        f"{phases}{steps}{teacher}"
    )
    return description


def _said_of_idle(args: argparse.Namespace, config: RecursiveGPTModelConfig) -> str:
    """The flags that were given to a recursion which is off, in an ablation say."""
    if config.recursion.enable_recursive_refinement:
        return ""
    off = RecursionConfig(enable_recursive_refinement=False).resolved(embedding_init_std=1.0)
    names = [name for name, value in vars(off).items() if getattr(config.recursion, name) != value]
    names += [name for name, value in OF_RUNS.items() if getattr(args, name) != value]
    said = ", ".join(map(flag_of, names))
    return f"\nrecursion is off: {said} {'do' if len(names) > 1 else 'does'} nothing" if names else ""


def _said_of_carried(args: argparse.Namespace, config: RecursiveGPTModelConfig) -> str:
    """How many steps a batch has, and what the carried states need: where a step starts and what it has left so far."""
    steps, names = config.recursion.num_supervision_steps, config.plan.carried
    if steps == 1:
        return ""
    size = f"{carried_bytes(args, config) / 1e6:,.1f} MB"
    until = ", or until a sample halts" if config.recursion.carry_halted else ""
    passes = config.step_plans(args).served_plan().num_passes
    return (
        f"\nsupervision: {steps} steps on each batch{until}, on carried states ({', '.join(names)}: {size} "
        f"on a rank of the first stage); an evaluation runs them in a row, {passes} passes"
    )


def run_description(
    args: argparse.Namespace, config: RecursiveGPTModelConfig, flops: FlopsPerToken | None = None
) -> dict[str, Any]:
    """What the metrics file says of a run before its metrics; ``flops``, where they are counted, of its mean step."""
    flops = flops or training_flops(config, args.seq_length, config.step_plans(args).counts())
    plan, shape = config.plan, model_shape(config, args.seq_length)
    parameters = count_parameters(shape, plan)
    passes = f"{plan.num_blocks} blocks, {plan.num_passes} passes" if not plan.is_plain else "plain GPT"
    return {
        "description": f"{shape.num_layers} layers of width {shape.hidden_size}, {passes}",
        "plan": plan.to_json(),
        "passes": plan.num_passes,
        "parameters held": parameters.held,
        "parameters unrolled": parameters.unrolled,
        "FLOPs per token": flops.total,
        "tokens per iteration": args.global_batch_size * args.seq_length,
        "world size": args.world_size,
        "command": sys.argv,
    }
