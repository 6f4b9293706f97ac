"""Small models for tests: built with known weights, trained through Megatron's own schedule, gathered over ranks.

A :class:`Case` says what is trained and a :class:`Layout` how it is spread, so that one case can be run in several
layouts and compared. Workers of ``run_distributed`` call the functions; Megatron is imported inside them, so that
pytest's own process, which only writes cases down, never loads it.
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
    """How it is spread over ranks; ``ddp`` are arguments of DistributedDataParallelConfig."""

    tp: int = 1
    sequence_parallel: bool = False
    ddp: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Training:
    """What a run gives, as one process would hold it; all but the parameters by step."""

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
        values["params_dtype"] = values["pipeline_dtype"] = torch.bfloat16
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
    """The model under Float16Module (bf16 only) and Megatron's DDP, wired to the schedule as in Megatron's training."""
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
    shared = {flag: layout.ddp.get(flag, False) for flag in ("use_distributed_optimizer", "overlap_param_gather")}
    precision = {"bf16": wrapped.config.bf16, "params_dtype": wrapped.config.params_dtype}
    return get_megatron_optimizer(OptimizerConfig(optimizer="adam", **precision, **shared, **case.optimizer), [wrapped])


def unwrapped(module: Any) -> Any:
    """The model inside DDP and Float16Module."""
    while hasattr(module, "module"):
        module = module.module
    return module


def named_parameters(module: Any) -> dict[str, torch.nn.Parameter]:
    return dict(unwrapped(module).named_parameters())


# --- known weights, and tensors spread over tensor-parallel ranks ---------------------------------------------------


def fill_weights(model: Any) -> None:
    """Weights that depend on the parameter's name alone, not on the layout; none is zero, so every path counts."""
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


def _shard(full: Tensor, parameter: Any, pieces: int) -> Tensor:
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


def make_batches(case: Case, step: int) -> list[dict[str, Any]]:
    """All micro-batches of a step. Each has another number of tokens in its loss mask."""
    generator = torch.Generator().manual_seed(1000 + step)
    mask = document_mask(MICRO_BATCH, SEQ, SEQ // 3) if case.documents else None
    batches = []
    for index in range(case.micro_batches):
        tokens = torch.randint(0, VOCAB, (MICRO_BATCH, SEQ + 1), generator=generator)
        kept = torch.rand(MICRO_BATCH, SEQ, generator=generator) > 0.15 * (index + 1)
        batches.append({
            "input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": kept.float(),
            "position_ids": torch.arange(SEQ).expand(MICRO_BATCH, SEQ), "attention_mask": mask,
        })  # fmt: skip
    return batches


def document_mask(batch: int, length: int, start: int) -> Tensor:
    """What --reset-attention-mask gives for a second document at ``start``: [B, 1, S, S], True hides."""
    position = torch.arange(length)
    later, document = position[None, :] > position[:, None], (position >= start).long()
    return (later | (document[:, None] != document[None, :])).expand(batch, 1, length, length).clone()


def forward_step(batches: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Any]:
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
    """As Megatron averages (sum, count) reports, over micro-batches and data-parallel ranks."""
    total = torch.stack(pairs).sum(0)
    dist.all_reduce(total, group=group)
    return float(total[0] / total[1])
