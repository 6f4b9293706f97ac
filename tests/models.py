"""Small models for tests: built with known weights, trained through Megatron's own schedule, gathered over ranks.

A :class:`Case` says what is trained; the layout (ranks, tensor parallelism, optimizer sharding) is separate, so that one
case can be run in several layouts and compared. Workers of ``run_distributed`` call the functions; Megatron is imported
inside them, so that pytest's own process, which only writes cases down, never loads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_recursive.plan import RecursionConfig, RecursionPlan

HIDDEN, HEADS, FFN, LAYERS, VOCAB, SEQ, MICRO_BATCH = 32, 4, 64, 2, 64, 16, 2
EMBEDDING_STD = 0.15

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        recursion: knobs that differ from the defaults of this file (T=2, n=2, embedding multiplier 1 / 0.15).
        plan: a plan of one's own, instead of the one that the knobs give.
        transformer, model: arguments of TransformerConfig and of the model that differ.
        micro_batches: of all data-parallel ranks together.
        optimizer: arguments of OptimizerConfig; None takes no optimizer step.
        documents: give an explicit attention mask that hides earlier documents.
    """

    recursion: Mapping[str, Any] = field(default_factory=dict)
    plan: RecursionPlan | None = None
    transformer: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    micro_batches: int = 4
    optimizer: Mapping[str, Any] | None = None
    steps: int = 1
    documents: bool = False

    def resolved_recursion(self) -> RecursionConfig:
        knobs = {"num_refinement_blocks": 2, "num_latent_refinements": 2, **self.recursion}
        return RecursionConfig(**knobs).resolved(embedding_init_std=EMBEDDING_STD)


@dataclass(frozen=True)
class Layout:
    """How it is spread over the ranks; ``ddp`` are arguments of DistributedDataParallelConfig."""

    tp: int = 1
    sequence_parallel: bool = False
    ddp: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Training:
    """What a run gives, as one process would hold it: gradients by global name; metrics and norms by step."""

    metrics: list[dict[str, float]]
    gradients: list[Tensors]
    gradient_norms: list[float]
    parameters: Tensors


def train(case: Case, layout: Layout) -> Training:
    """Train a case for its steps, with Megatron's schedule, DDP and (if it has one) optimizer."""
    wrapped = build_wrapped(case, layout)
    optimizer = build_optimizer(case, layout, wrapped)
    result = Training([], [], [], {})
    for step in range(case.steps):
        wrapped.zero_grad_buffer()
        if optimizer is not None:
            optimizer.zero_grad()  # otherwise .grad still is main_grad, which the backward would add to itself
        result.metrics.append(run_schedule(wrapped, case, step))
        result.gradients.append(full_gradients(wrapped))
        if optimizer is not None:
            succeeded, norm, _ = optimizer.step()
            assert succeeded
            result.gradient_norms.append(float(norm))
    if optimizer is not None and layout.ddp.get("overlap_param_gather"):
        wrapped.disable_forward_pre_hook(param_sync=True)  # parameters are gathered by the next forward otherwise
    result.parameters = gathered({n: p.data for n, p in named_parameters(wrapped).items()}, wrapped)
    return result


# --- building -------------------------------------------------------------------------------------------------------


def start_parallel(tp: int = 1, seed: int = 123) -> None:
    """Megatron's process groups and random state; a second call within one job starts over."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def transformer_config(case: Case, layout: Layout) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = dict(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, ffn_hidden_size=FFN,
        tensor_model_parallel_size=layout.tp, sequence_parallel=layout.sequence_parallel, use_cpu_initialization=True,
        init_method_std=EMBEDDING_STD, hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False,
        bias_activation_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        apply_rope_fusion=False, persist_layer_norm=False, transformer_impl="local",
    )  # fmt: skip
    values.update(case.transformer)
    if values.get("bf16"):
        values.update(params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
    if values.pop("swiglu", False):
        values.update(gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    return TransformerConfig(**values)


def build_model(case: Case, layout: Layout = Layout(), *, known_weights: bool = True) -> Any:  # noqa: B008
    """The bare model; :func:`start_parallel` must have been called."""
    from megatron_recursive.models.layer_specs import local_block_spec
    from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel

    config = transformer_config(case, layout)
    arguments = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": True, **case.model}
    model = RecursiveGPTModel(
        config, local_block_spec(config), VOCAB, SEQ, recursion=case.resolved_recursion(), plan=case.plan, **arguments
    )
    if known_weights:
        fill_weights(model)
    return model


def build_wrapped(case: Case, layout: Layout) -> Any:
    """The model under Float16Module (bf16 only) and Megatron's DDP, wired to the schedule as Megatron's training does."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.module import Float16Module

    start_parallel(layout.tp)
    model = build_model(case, layout)
    config = model.config
    if config.bf16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **layout.ddp})
    wrapped = DistributedDataParallel(config, ddp, model)
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        config.no_sync_func = wrapped.no_sync
    return wrapped


def build_optimizer(case: Case, layout: Layout, wrapped: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    if case.optimizer is None:
        return None
    config = wrapped.config
    optimizer = OptimizerConfig(
        optimizer="adam", bf16=config.bf16, params_dtype=config.params_dtype,
        use_distributed_optimizer=layout.ddp.get("use_distributed_optimizer", False),
        overlap_param_gather=layout.ddp.get("overlap_param_gather", False), **case.optimizer,
    )  # fmt: skip
    config.grad_scale_func = None
    return get_megatron_optimizer(optimizer, [wrapped])


def unwrapped(module: Any) -> Any:
    """The model inside DDP and Float16Module."""
    while hasattr(module, "module"):
        module = module.module
    return module


def named_parameters(module: Any) -> dict[str, torch.nn.Parameter]:
    return dict(unwrapped(module).named_parameters())


# --- known weights, and tensors spread over tensor-parallel ranks ---------------------------------------------------


def fill_weights(model: Any) -> None:
    """Weights that depend on the parameter's name alone, so that every layout starts from the same model.

    They are larger than an initialisation, and none is zero: every path of the recursion then matters.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            pieces = _pieces(name, model.config)
            shape = list(parameter.shape)
            if getattr(parameter, "tensor_model_parallel", False):
                shape[parameter.partition_dim] *= model.config.tensor_model_parallel_size
            generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
            full = EMBEDDING_STD * torch.randn(shape, generator=generator)
            if "norm" in name and name.endswith("weight") and not model.config.layernorm_zero_centered_gamma:
                full += 1.0
            parameter.copy_(_shard(full, parameter, pieces))


def _pieces(name: str, config: Any) -> int:
    """Megatron shards the two halves of a gated MLP's first matrix apart."""
    return 2 if config.gated_linear_unit and "linear_fc1" in name else 1


def _shard(full: Tensor, parameter: Tensor, pieces: int) -> Tensor:
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    axis = parameter.partition_dim
    return torch.cat([piece.chunk(size, axis)[rank] for piece in full.chunk(pieces, axis)], axis)


def gathered(local: Mapping[str, Tensor], module: Any) -> Tensors:
    """Tensors shaped like the parameters of the same names, whole. Replicated ones are this rank's own."""
    from megatron.core import parallel_state

    group, parameters = parallel_state.get_tensor_model_parallel_group(), named_parameters(module)
    full = {}
    for name, tensor in local.items():
        parameter, pieces = parameters[name], _pieces(name, unwrapped(module).config)
        if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
            shards = [torch.empty_like(tensor) for _ in range(group.size())]
            dist.all_gather(shards, tensor.contiguous(), group=group)
            axis = parameter.partition_dim
            halves = zip(*(shard.chunk(pieces, axis) for shard in shards), strict=True)
            tensor = torch.cat([torch.cat(half, axis) for half in halves], axis)
        full[name] = tensor.detach().clone()
    return full


def full_gradients(wrapped: Any) -> Tensors:
    """``main_grad`` of every parameter after the schedule, gathered over both groups."""
    if wrapped.ddp_config.use_distributed_optimizer:
        for buffer in wrapped.buffers:
            for bucket in buffer.buckets:  # each data-parallel rank has reduced its own part
                shards = list(bucket.grad_data.chunk(buffer.data_parallel_world_size))
                own = shards[dist.get_rank(buffer.data_parallel_group)].clone()
                whole = [torch.empty_like(own) for _ in shards]
                dist.all_gather(whole, own, group=buffer.data_parallel_group)
                bucket.grad_data.copy_(torch.cat(whole))
    return gathered({name: p.main_grad for name, p in named_parameters(wrapped).items()}, wrapped)


# --- one training step ----------------------------------------------------------------------------------------------

Batch = dict[str, Tensor]


def make_batches(case: Case, step: int) -> list[Batch]:
    """All micro-batches of a step. Each has another number of tokens in its loss mask."""
    generator = torch.Generator().manual_seed(1000 + step)
    batches = []
    for index in range(case.micro_batches):
        tokens = torch.randint(0, VOCAB, (MICRO_BATCH, SEQ + 1), generator=generator)
        kept = torch.rand(MICRO_BATCH, SEQ, generator=generator) > 0.15 * (index + 1)
        batches.append({
            "input_ids": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": kept.float(),
            "position_ids": torch.arange(SEQ).expand(MICRO_BATCH, SEQ),
            "attention_mask": document_mask(MICRO_BATCH, SEQ, SEQ // 3) if case.documents else None,
        })
    return batches


def document_mask(batch: int, length: int, start: int) -> Tensor:
    """What --reset-attention-mask gives for a second document at ``start``: [B, 1, S, S], True hides."""
    position = torch.arange(length)
    later, document = position[None, :] > position[:, None], (position >= start).long()
    return (later | (document[:, None] != document[None, :])).expand(batch, 1, length, length).clone()


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Any, Any]:
    batch = next(batches)
    return model(**batch), partial(loss_func, batch["loss_mask"])


def loss_func(loss_mask_BS: Tensor, output: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The reduction of ``training/forward_step.py``, without Megatron's global arguments."""
    objective_BS = getattr(output, "objective_BS", output)
    loss, count = (objective_BS.float() * loss_mask_BS).sum(), loss_mask_BS.sum()
    report = getattr(output, "metrics", None) or {"lm loss": torch.stack([loss.detach(), count])}
    return loss, count.to(torch.int), report


def run_schedule(wrapped: Any, case: Case, step: int = 0, *, forward_only: bool = False) -> dict[str, float]:
    """One step of Megatron's unmodified schedule: this rank's micro-batches, forward and backward; the report."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    group = parallel_state.get_data_parallel_group()
    batches = make_batches(case, step)[group.rank() :: group.size()]
    wrapped.train(not forward_only)
    reports = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches), model=[wrapped], num_microbatches=len(batches),
        seq_length=SEQ, micro_batch_size=MICRO_BATCH, forward_only=forward_only,
    )  # fmt: skip
    return {name: _ratio([report[name] for report in reports], group) for name in reports[0]}


def _ratio(pairs: list[Tensor], group: Any) -> float:
    """Megatron's own averaging of (sum, count) reports, over micro-batches and data-parallel ranks."""
    total = torch.stack(pairs).sum(0)
    dist.all_reduce(total, group=group)
    return float(total[0] / total[1])


# --- comparing ------------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over the largest absolute expected value (or ``floor``, if that is larger)."""
    if not torch.isfinite(actual).all():
        return float("inf")
    scale = max(float(expected.abs().max()), floor, torch.finfo(torch.float32).tiny)
    return float((actual.double() - expected.double()).abs().max()) / scale


def worst_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over named tensors, and whose it is. Both must have the same names.

    Each tensor is measured by its own scale, but by no less than 1e-4 of the largest one: a key's bias, say, has a
    gradient of exactly zero in theory and of rounding errors in practice.
    """
    assert set(actual) == set(expected), set(actual) ^ set(expected)
    floor = 1e-4 * max(float(tensor.abs().max()) for tensor in expected.values())
    return max((relative_error(actual[name], expected[name], floor), name) for name in expected)


# --- option grid ----------------------------------------------------------------------------------------------------

# Shapes and features of the layers that a recursive model has to carry; none of them is about the recursion.
OPTIONS: dict[str, Case] = {
    "layernorm-gelu-rope-tied": Case(),
    "rmsnorm-swiglu-untied-no-bias": Case(
        transformer={"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False},
        model={"share_embeddings_and_output_weights": False},
    ),
    "learned-positions": Case(model={"position_embedding_type": "learned_absolute"}),
    "rope-scaling": Case(model={"rope_scaling": True, "rope_scaling_factor": 32.0}),
    "rotary-percent": Case(model={"rotary_percent": 0.5}),
    "grouped-queries-qkv-bias": Case(
        transformer={"num_query_groups": 2, "add_bias_linear": False, "add_qkv_bias": True}
    ),
    "qk-norm-rmsnorm": Case(transformer={"normalization": "RMSNorm", "qk_layernorm": True, "num_query_groups": 2}),
    "qk-norm-layernorm-wide-heads": Case(transformer={"qk_layernorm": True, "kv_channels": 16}),
    "zero-centered-norm": Case(transformer={"layernorm_zero_centered_gamma": True, "normalization": "RMSNorm"}),
    "no-halting": Case(recursion={"halt_loss_weight": 0.0}),
    "state-norm-none": Case(recursion={"state_norm": "none"}, model={"share_embeddings_and_output_weights": False}),
    "trunc-normal": Case(recursion={"state_init": "trunc-normal"}),
    "disabled": Case(recursion={"enable_recursive_refinement": False}),
    "bf16": Case(transformer={"bf16": True, "swiglu": True}, recursion={"state_init": "trunc-normal"}),
}
