"""The layouts in which a job fits its GPUs: memory by ``accounting``, time by the simulated step, the fastest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

from megatron_recursive.accounting import ModelShape, Recording, StageMemory, StateBytes, padded_rows, stage_memory
from megatron_recursive.accounting.flops import layer_forward_flops
from megatron_recursive.errors import UserError
from megatron_recursive.pipeline.balance import balanced_split
from megatron_recursive.pipeline.pass_costs import PassCosts, price_passes
from megatron_recursive.pipeline.planner import Step, simulated_step
from megatron_recursive.pipeline.windows import most_held
from megatron_recursive.plan import RecursionPlan

GIB = 2**30
USABLE = 0.9  # of a GPU's memory; CUDA, NCCL, buffers of kernels and the allocator's gaps have the rest
TENSOR_COST = 0.05  # of the time, for every doubling of the tensor-parallel size: a stated guess, not simulated


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what.

    Attributes:
        shape: with the padded vocabulary, or with ``pads_vocabulary`` one that Megatron pads for each layout.
        memory: bytes of a GPU. flops: what a GPU computes a second, while it does.
        recording, state: of one tensor-parallel rank and one optimizer shard; each layout has its own.
        node: GPUs that a tensor-parallel group may span. window: ``--pipeline-window``.
    """

    shape: ModelShape
    plan: RecursionPlan
    gpus: int
    memory: float
    flops: float
    global_batch: int
    recording: Recording
    state: StateBytes
    distributed_optimizer: bool = False
    pads_vocabulary: bool = False
    node: int = 8
    window: int = 0

    @property
    def backward_cost(self) -> float:
        return 2.0 + self.recording.recompute_passes + (self.recording.recompute_layers > 0)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.shape.seq_length


@dataclass(frozen=True)
class Layout:
    """How a job is spread, ``split`` being the layers of each stage.

    ``memory`` is that of the fullest stage, ``stage``, of all ``stages``; a step takes ``seconds``.
    """

    tensor: int
    pipeline: int
    data: int
    micro_batches: int
    stage: int
    memory: StageMemory
    efficiency: float
    seconds: float
    split: tuple[int, ...]
    stages: tuple[StageMemory, ...]


def fitting_layouts(job: Job) -> list[Layout]:
    """The fastest first; of equally fast ones, that of the smaller tensor-parallel and pipeline sizes."""
    found = [layout for sizes in _sizes(job) if (layout := _layout(job, *sizes)).memory.total <= USABLE * job.memory]
    return sorted(found, key=lambda layout: (layout.seconds, layout.tensor, layout.pipeline))


def stage_layers(job: Job, pipeline: int) -> tuple[int, ...]:
    return balanced_split(job.plan, job.shape, pipeline, job.backward_cost)


def layout_of(job: Job, tensor: int, pipeline: int) -> Layout:
    """The layout of these sizes, whether it fits or not.

    Raises:
        UserError: they divide something unevenly, or leave a stage without a micro-batch.
    """
    found = [sizes for sizes in _sizes(replace(job, node=job.gpus)) if sizes[:2] == (tensor, pipeline)]
    if not found:
        raise UserError(
            f"--tp {tensor} and --pp {pipeline} on {job.gpus} GPUs divide the heads, groups, layers, vocabulary and "
            f"the batch of {job.global_batch} into no equal ranks with a micro-batch for each stage; change them."
        )
    return _layout(replace(job, memory=math.inf), *found[0])


def stage_costs(job: Job, pipeline: int) -> PassCosts:
    return price_passes(job.plan, job.shape, stage_layers(job, pipeline), job.backward_cost)


def _sizes(job: Job) -> Iterator[tuple[int, int, int, int]]:
    """(tensor, pipeline, data, micro-batches) of all layouts with equal stages and a micro-batch for each stage."""
    shape, node = job.shape, min(job.node, job.gpus)
    rows = 0 if job.pads_vocabulary else shape.vocab_size  # 0 is divided by everything
    divided = math.gcd(node, job.gpus, shape.num_query_groups, shape.num_attention_heads, shape.ffn_hidden_size,
                       shape.seq_length, rows)  # fmt: skip
    for tensor in (n for n in range(1, node + 1) if divided % n == 0):
        ranks = job.gpus // tensor
        for pipeline in (n for n in range(1, shape.num_layers + 1) if math.gcd(ranks, shape.num_layers) % n == 0):
            data = ranks // pipeline
            batches, ragged = divmod(job.global_batch, data * job.recording.micro_batch)
            if not ragged and batches >= pipeline:
                yield tensor, pipeline, data, batches


def _layout(job: Job, tensor: int, pipeline: int, data: int, batches: int) -> Layout:
    """With its step simulated, unless one micro-batch alone is too much."""
    shape, plan, split = job.shape, job.plan, stage_layers(job, pipeline)
    if job.pads_vocabulary:
        shape = replace(shape, vocab_size=padded_rows(shape.vocab_size, tensor))
    recording = replace(job.recording, tensor_parallel=tensor, sequence_parallel=tensor > 1)
    state = replace(job.state, optimizer_shards=data if job.distributed_optimizer else 1)

    def stages_at(step: Step) -> list[StageMemory]:
        held = partial(most_held, costs.grad, pipeline, batches, step.windows) if math.isfinite(step.makespan) else None
        return stage_memory(shape, plan, recording, state, layers_per_stage=split, most_held=held,
                            in_flight=step.in_flight, window=step.window)  # fmt: skip

    step, costs = Step(math.inf, 0.0, 1), stage_costs(job, pipeline)
    if max(stage.total for stage in stages_at(step)) <= USABLE * job.memory:
        step = simulated_step(costs, batches, window=job.window)
    forward = layer_forward_flops(shape) * shape.num_layers * shape.seq_length * recording.micro_batch / job.flops
    seconds = step.makespan * forward / tensor * (1 + TENSOR_COST * math.log2(tensor))
    stages = stages_at(step)
    fullest = max(range(pipeline), key=lambda stage: stages[stage].total)
    return Layout(tensor, pipeline, data, batches, fullest, stages[fullest], step.efficiency, seconds, split,
                  tuple(stages))  # fmt: skip


_CHANGES: dict[str, Callable[[Job], Job]] = {
    "--use-distributed-optimizer": lambda job: replace(job, distributed_optimizer=True),
    "--recompute-passes": lambda job: replace(job, recording=replace(job.recording, recompute_passes=True)),
    "--recompute-granularity full": lambda job: replace(job, recording=replace(job.recording, recompute_layers=1)),
    "--micro-batch-size 1": lambda job: replace(job, recording=replace(job.recording, micro_batch=1)),
}


def what_would_fit(job: Job) -> str:
    """A sentence on a job that fits in no layout: why, and the least change under which it fits."""
    every = [_layout(job, *sizes) for sizes in _sizes(job)]
    if not every:
        return (
            f"{job.gpus} GPUs, {job.shape.num_layers} layers and a global batch of {job.global_batch} divide into no "
            "layout with a micro-batch for each stage; try another --global-batch-size or --gpus."
        )
    least = min(every, key=lambda layout: layout.memory.total)
    said = (
        f"No layout fits: the leanest (TP {least.tensor}, PP {least.pipeline}, DP {least.data}) needs at least "
        f"{least.memory.total / GIB:,.1f} GiB a GPU, of which {USABLE * job.memory / GIB:,.1f} may be filled"
    )
    for times in (1, 2, 4, 8, 16):
        for names in (names for count in range(len(_CHANGES) + 1) for names in combinations(_CHANGES, count)):
            changed = replace(job, gpus=times * job.gpus, global_batch=times * job.global_batch)
            for name in names:
                changed = _CHANGES[name](changed)
            if fitting_layouts(changed):
                words = [*names, *([f"--gpus {changed.gpus}"] if times > 1 else [])]
                return f"{said}; it fits with {' and '.join(words)}."
    return f"{said}; nor does it with {16 * job.gpus} GPUs and all recomputation, so that it takes larger GPUs."
