"""The theoretical memory of a run, by pipeline stage, and the lines that Megatron prints of it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from megatron_recursive.accounting import Recording, StageMemory, StateBytes, stage_memory
from megatron_recursive.backends import cpu
from megatron_recursive.models.layer_specs import layers_of_stages
from megatron_recursive.pipeline.planner import chosen_windows
from megatron_recursive.pipeline.windows import in_flight, most_held
from megatron_recursive.plan.trips import trips_of
from megatron_recursive.training.model_provider import RecursiveGPTModelConfig, model_shape

MB = 1024 * 1024  # as Megatron's report


def report(
    config: RecursiveGPTModelConfig, args: argparse.Namespace, num_microbatches: int | None, verbose: bool
) -> tuple[float, float, float]:
    """Print what the fullest rank holds, in MB, and return it: weights and optimizer, activations, total."""
    stages = memory_of_run(args, config, num_microbatches)
    if verbose:
        for stage, memory in enumerate(stages):
            print(f"Theoretical memory of a rank of pipeline stage {stage}: {describe(memory)}")
    most = max(stages, key=lambda memory: memory.total)
    weights, activations, total = (size / MB for size in (most.weights, most.activations, most.total))
    print(
        f"Theoretical memory footprints: weight and optimizer={weights:.2f} MB, "
        f"activation={activations:.2f} MB, total={total:.2f} MB\n",
        flush=True,
    )
    return weights, activations, total


def describe(memory: StageMemory) -> str:
    """The parts of a stage's memory, in MB."""
    parts = {"weight and optimizer": memory.weights, "recorded passes": memory.decoder, "heads": memory.heads,
             "replay": memory.replay, "states": memory.states, "total": memory.total}  # fmt: skip
    return ", ".join(f"{name}={size / MB:.2f} MB" for name, size in parts.items() if size)


def memory_of_run(
    args: argparse.Namespace,
    config: RecursiveGPTModelConfig,
    num_microbatches: int | None = None,
    recording: Recording | None = None,
) -> list[StageMemory]:
    """The theoretical memory of a rank of every pipeline stage, of a run with validated arguments.

    ``num_microbatches`` is that of the present batch size where it ramps up; the final one if left out. ``recording``
    is this machine's if left out.
    """
    plan, stages = config.step_plans(args).deepest, args.pipeline_model_parallel_size
    transformer: Any = config.transformer
    batches = num_microbatches or args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    phases = transformer.pipeline_phases, transformer.pipeline_window
    windows = chosen_windows(transformer.pipeline_costs(plan), batches, *phases)  # as the run has chosen them
    split = layers_of_stages(transformer)
    grad = [trip.grad for trip in trips_of(plan, split)]
    interleaved = len(grad) > 1
    stages_memory = stage_memory(
        model_shape(config, args.seq_length), plan, recording or recording_of(args, config), state_bytes(args),
        layers_per_stage=split, most_held=partial(most_held, grad, stages, batches, windows),
        in_flight=in_flight(stages, batches, windows, interleaved=interleaved), window=max(windows, default=0),
        teacher=None if config.distillation is None else config.distillation.costs(args.seq_length)[0],
    )  # fmt: skip
    carried = [0.0] * stages
    if size := carried_bytes(args, config):
        carried[-1] += size / (2 * len(plan.carried)) * (stages > 1)  # the outputs, until they are sent
        carried[0] += size
    return [replace(x, states=x.states + more) for x, more in zip(stages_memory, carried, strict=True)]


def carried_bytes(args: argparse.Namespace, config: RecursiveGPTModelConfig) -> int:
    """What the first stage holds of --num-supervision-steps: the states that a step starts at, and that it leaves."""
    if config.recursion.num_supervision_steps == 1:
        return 0
    sequences = args.global_batch_size // args.data_parallel_size
    parts = args.tensor_model_parallel_size if args.sequence_parallel else 1
    state = sequences * args.seq_length // parts * config.hidden_size * args.params_dtype.itemsize
    return 2 * len(config.plan.carried) * state


def recording_of(args: argparse.Namespace, config: RecursiveGPTModelConfig) -> Recording:
    """What the flags say about how much a pass keeps."""
    transformer: Any = config.transformer
    on_cpu, element = cpu.is_installed(), args.params_dtype.itemsize
    modules = transformer.recompute_modules or () if args.recompute_granularity == "selective" else ()
    together = args.recompute_num_layers or 1 if args.recompute_granularity == "full" else 0
    local = transformer.transformer_impl == "local"
    return Recording(
        micro_batch=args.micro_batch_size,
        element=element,
        tensor_parallel=args.tensor_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        rotary=config.position_embedding_type in ("rope", "yarn"),
        # A dropout mask is boolean on CUDA; the CPU keeps what it multiplies with.
        dropout_mask=(element if on_cpu else 1) if args.hidden_dropout > 0 else 0,
        splits_norm=on_cpu and transformer.normalization == "RMSNorm",
        splits_activation=local and not transformer.bias_activation_fusion,
        recompute_layers=together if args.recompute_method == "uniform" else 0,
        recompute_block=together if args.recompute_method == "block" else 0,
        recompute_mlp="mlp" in modules,
        recompute_passes=transformer.recompute_passes,
    )


def state_bytes(args: argparse.Namespace) -> StateBytes:
    """Bytes a parameter under the optimizer of this run: SGD and Muon keep one moment, the others two."""
    parameter = args.params_dtype.itemsize
    if args.train_only == "heads" or args.lora_rank is not None:  # a few vectors, or low-rank matrices, have more
        return StateBytes(parameter, 0, 0)
    main_copy = 4 if parameter < 4 else 0
    moments = 4 if args.optimizer in ("sgd", "muon") else 8
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or args.params_dtype == torch.float32 else parameter
    shards = args.data_parallel_size if args.use_distributed_optimizer else 1
    average = 0 if args.ema_decay is None else 4
    return StateBytes(parameter, gradient, main_copy + moments + average, shards)
