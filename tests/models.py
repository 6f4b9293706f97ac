"""Small models for tests: built with known weights, trained through Megatron's own schedule, gathered over ranks.

A :class:`Case` says what is trained and a :class:`Layout` how it is spread, so that one case can be run in several
layouts and compared. Workers of ``run_distributed`` call the functions; Megatron is imported inside them, so that
pytest's own process, which only writes cases down, never loads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_recursive.plan import RecursionConfig, RecursionPlan
from megatron_recursive.plan.knobs import families_of
from tests.distributed import ON_GPU
from tests.parameters import EMBEDDING_STD, Tensors, fill_weights, full_gradients, gathered, named_parameters

HIDDEN, HEADS, FFN, LAYERS, VOCAB, SEQ, MICRO_BATCH = 32, 4, 64, 2, 64, 16, 2


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        recursion: knobs that differ from the defaults of this file (T=2, n=2, cut between blocks, embedding multiplier
            1 / 0.15).
        plan: a plan of one's own, instead of the one that the knobs give.
        transformer, model, norms: arguments of TransformerConfig, of the model and of NormLayout that differ.
        layers: changes the local block spec in place.
        micro_batches: of all data-parallel ranks together.
        optimizer: arguments of OptimizerConfig; None takes no optimizer step.
        documents: samples hold several, each of which sees itself alone.
        masked: that is said by an explicit attention mask [B, 1, S, S], as nothing here does but for comparison.
        evaluate: also evaluate after every step.
    """

    recursion: Mapping[str, Any] = field(default_factory=dict)
    plan: RecursionPlan | None = None
    transformer: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    layers: Callable[[Any], None] | None = None
    micro_batches: int = 4
    optimizer: Mapping[str, Any] | None = None
    steps: int = 1
    documents: bool = False
    masked: bool = False
    evaluate: bool = False

    def resolved_recursion(self) -> RecursionConfig:
        default = {"num_refinement_blocks": 2, "num_latent_refinements": 2, "detach_between_refinements": True}
        knobs = {**default, **self.recursion}
        family = knobs.get("recursion_family", "core")
        knobs = {name: value for name, value in knobs.items() if family in (families_of(name, value) or (family,))}
        return RecursionConfig(**knobs).resolved(embedding_init_std=EMBEDDING_STD)


@dataclass(frozen=True)
class Layout:
    """How it is spread over ranks.

    Attributes:
        tp, pp: tensor- and pipeline-parallel sizes; the other ranks are data-parallel.
        ddp: arguments of DistributedDataParallelConfig.
        stages: arguments of TransformerConfig that say which stage holds which layers.
        phases, window: of the ring.
        recompute_passes: replay passes in the backward.
        engine: Transformer Engine's layers. On GPUs (MEGATRON_RECURSIVE_TEST_GPU=1; none has run it yet) also its fused
            kernels, and gradients accumulated by Apex's kernel where that is installed; on CPUs its stand-ins.
    """

    tp: int = 1
    sequence_parallel: bool = False
    ddp: Mapping[str, Any] = field(default_factory=dict)
    pp: int = 1
    stages: Mapping[str, Any] = field(default_factory=dict)
    phases: str = "auto"
    window: int = 0
    recompute_passes: bool = False
    engine: bool = False


@dataclass
class Training:
    """What a run gives, as one process would hold it; all but the parameters by step.

    ``loss_scales`` are those that the steps of fp16 used; a step that overflowed, and was skipped, has the norm inf.

    On several pipeline stages a rank has the gradients and parameters of its own stage, named as in the whole model,
    and metrics on the last stage only.
    """

    metrics: list[dict[str, float]]
    gradients: list[Tensors]
    gradient_norms: list[float]
    parameters: Tensors
    evaluations: list[dict[str, float]] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)


def train(case: Case, layout: Layout) -> Training:
    """Train a case for its steps, with Megatron's schedule, DDP and (if it has one) optimizer."""
    wrapped = build_wrapped(case, layout)
    optimizer = build_optimizer(case, layout, wrapped)
    result = Training([], [], [], {})
    fp16 = wrapped.config.fp16
    for step in range(case.steps):
        wrapped.zero_grad_buffer()
        if optimizer is not None:
            optimizer.zero_grad()  # otherwise .grad still is main_grad, which the backward would add to itself
        result.metrics.append(run_schedule(wrapped, case, step))
        result.gradients.append(full_gradients(wrapped))
        if optimizer is not None:
            result.loss_scales += [float(optimizer.get_loss_scale())] if fp16 else []
            succeeded, norm, _ = optimizer.step()
            assert succeeded or fp16
            result.gradient_norms.append(float(norm) if succeeded else math.inf)
        if case.evaluate:
            result.evaluations.append(run_schedule(wrapped, case, step + 100, forward_only=True))
    if optimizer is not None and layout.ddp.get("overlap_param_gather"):
        wrapped.disable_forward_pre_hook(param_sync=True)  # parameters are gathered by the next forward otherwise
    result.parameters = gathered({n: p.data for n, p in named_parameters(wrapped).items()}, wrapped)
    return result


# --- building -------------------------------------------------------------------------------------------------------


def start_parallel(tp: int = 1, pp: int = 1, seed: int = 123) -> None:
    """Megatron's process groups and random state. A second call within one job seeds anew.

    It keeps groups of the same sizes: they take up to a fifth of a second to make, and gloo never gives them back.
    """
    from megatron.core import parallel_state as state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    sizes = (tp, pp)
    if not state.model_parallel_is_initialized() or sizes != (
        state.get_tensor_model_parallel_world_size(), state.get_pipeline_model_parallel_world_size()
    ):  # fmt: skip
        state.destroy_model_parallel()
        state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def transformer_config(case: Case, layout: Layout) -> Any:
    from megatron_recursive.models.recursive_gpt_model import RecursiveTransformerConfig

    values = dict(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, ffn_hidden_size=FFN,
        tensor_model_parallel_size=layout.tp, sequence_parallel=layout.sequence_parallel, use_cpu_initialization=True,
        init_method_std=EMBEDDING_STD, hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False,
        bias_activation_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        apply_rope_fusion=False, persist_layer_norm=False, transformer_impl="local",
        pipeline_model_parallel_size=layout.pp, pipeline_dtype=torch.float32, deallocate_pipeline_outputs=True,
        pipeline_phases=layout.phases, pipeline_window=layout.window, recompute_passes=layout.recompute_passes,
    )  # fmt: skip
    if layout.engine and not ON_GPU:
        values["transformer_impl"] = "transformer_engine"
    elif layout.engine:
        values.update(
            transformer_impl="transformer_engine", bias_dropout_fusion=True, bias_activation_fusion=True,
            apply_rope_fusion=True, persist_layer_norm=True,
            gradient_accumulation_fusion=find_spec("fused_weight_gradient_mlp_cuda") is not None,
        )  # fmt: skip
    values.update(case.transformer, **layout.stages)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if values.get(precision):
            values["params_dtype"] = values["pipeline_dtype"] = dtype
    if values.pop("swiglu", False):
        values.update(gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    return RecursiveTransformerConfig(**values)


def build_model(case: Case, layout: Layout = Layout(), *, known_weights: bool = True) -> Any:  # noqa: B008
    """The bare model, or this rank's stage of it; :func:`start_parallel` must have been called."""
    from megatron.core import parallel_state

    from megatron_recursive.models.layer_specs import local_block_spec
    from megatron_recursive.models.norm_placement import NormLayout
    from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel

    config = transformer_config(case, layout)
    arguments = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": True, **case.model}
    norms = NormLayout(**case.norms)
    spec = _engine_spec(config, norms) if layout.engine else local_block_spec(config, norms=norms)
    if case.layers is not None:
        case.layers(spec)
    model = RecursiveGPTModel(
        config, spec, VOCAB, SEQ,
        recursion=case.resolved_recursion(), plan=case.plan,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        **arguments,
    )  # fmt: skip
    if known_weights:
        fill_weights(model)
    return model.cuda() if ON_GPU else model


def _engine_spec(config: Any, norms: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from megatron_recursive.models.layer_specs import engine_layer_spec

    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return engine_layer_spec(spec, config, norms)


def build_wrapped(case: Case, layout: Layout) -> Any:
    """The model under Float16Module (bf16, fp16) and Megatron's DDP, wired to the schedule as in its training."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.module import Float16Module

    start_parallel(layout.tp, layout.pp)
    model = build_model(case, layout)
    config = model.config
    if config.bf16 or config.fp16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **layout.ddp})
    wrapped = DistributedDataParallel(config, ddp, model)
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        config.no_sync_func = wrapped.no_sync
    return wrapped


def build_optimizer(case: Case, layout: Layout, wrapped: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.utils import unwrap_model

    from megatron_recursive.optimizers import registry
    from megatron_recursive.optimizers.parameter_groups import group_overrides

    if case.optimizer is None:
        return None
    shared = {flag: layout.ddp.get(flag, False) for flag in ("use_distributed_optimizer", "overlap_param_gather")}
    config = wrapped.config
    precision = {"bf16": config.bf16, "fp16": config.fp16, "params_dtype": config.params_dtype}
    options = OptimizerConfig(**{"optimizer": "adam", **precision, **shared, **case.optimizer})
    registry.register()
    overrides = get_standard_config_overrides(options) | group_overrides([unwrap_model(wrapped)], options, {})
    optimizer = get_megatron_optimizer(options, [wrapped], overrides)
    if config.fp16:
        config.grad_scale_func = optimizer.scale_loss
    return optimizer


# --- one training step ----------------------------------------------------------------------------------------------


def make_batches(case: Case, step: int) -> list[dict[str, Any]]:
    """All micro-batches of a step. Each has another number of tokens in its loss mask."""
    generator = torch.Generator().manual_seed(1000 + step)
    mask = documents = None
    if case.documents and case.masked:
        mask = mask_of(document_ids())
    elif case.documents:
        from megatron_recursive.models.documents import Documents

        documents = Documents.of(document_ids().cuda() if ON_GPU else document_ids())
    batches = []
    for index in range(case.micro_batches):
        tokens = torch.randint(0, VOCAB, (MICRO_BATCH, SEQ + 1), generator=generator)
        kept = torch.rand(MICRO_BATCH, SEQ, generator=generator) > 0.15 * (index + 1)
        batches.append({
            "input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": kept.float(),
            "position_ids": torch.arange(SEQ).expand(MICRO_BATCH, SEQ), "attention_mask": mask,
            "packed_seq_params": documents,
        })  # fmt: skip
    return batches


def document_mask(batch: int, length: int, start: int) -> Tensor:
    """Of a second document at ``start`` in every sample: [B, 1, S, S], True hides."""
    return mask_of((torch.arange(length) >= start).long().expand(batch, length))


def document_ids() -> Tensor:
    """Of :func:`make_batches`, [B, S]: a second document in each sample at S // 3, and in the last one others."""
    ids = (torch.arange(SEQ) >= SEQ // 3).long().repeat(MICRO_BATCH, 1)
    ids[-1, SEQ // 2 :] += 1
    ids[-1, -1] += 1
    return ids


def mask_of(ids: Tensor) -> Tensor:
    """What Megatron's loader makes of documents: [B, 1, S, S], True hides."""
    place = torch.arange(ids.shape[1])
    return ((place[None, :] > place[:, None]) | (ids[:, :, None] != ids[:, None, :]))[:, None]


def forward_step(batches: Iterator[dict[str, Any]], model: Any, **more: Any) -> tuple[Any, Any]:
    batch = next(batches)
    if ON_GPU:
        batch = {name: each.cuda() if isinstance(each, Tensor) else each for name, each in batch.items()}
    return model(**batch, **more), partial(loss_func, batch["loss_mask"])


def loss_func(loss_mask_BS: Tensor, output: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The reduction of ``training/forward_step.py``, without Megatron's global arguments."""
    objective_BS = getattr(output, "objective_BS", output)
    loss, count = (objective_BS.float() * loss_mask_BS).sum(), loss_mask_BS.sum()
    report = getattr(output, "metrics", None) or {"lm loss": torch.stack([loss.detach(), count])}
    return loss, count.to(torch.int), report


def run_schedule(
    wrapped: Any, case: Case, step: int = 0, *, forward_only: bool = False, plan: Any = None
) -> dict[str, float]:
    """One step of the schedule that Megatron picks: this rank's micro-batches, forward and backward; the report.

    ``plan``: of this step, in place of the model's own.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_recursive.pipeline import dispatch

    dispatch.install()
    group = parallel_state.get_data_parallel_group()
    batches = make_batches(case, step)[group.rank() :: group.size()]
    one_stage = parallel_state.get_pipeline_model_parallel_world_size() == 1
    of_step = {} if plan is None else {"plan": plan}
    wrapped.train(not forward_only)
    with torch.set_grad_enabled(not forward_only):
        reports = get_forward_backward_func()(
            forward_step_func=partial(forward_step, **of_step) if one_stage else forward_step,
            data_iterator=iter(batches), model=[wrapped], num_microbatches=len(batches),
            seq_length=SEQ, micro_batch_size=MICRO_BATCH, forward_only=forward_only, **({} if one_stage else of_step),
        )  # fmt: skip
    names = reports[0] if reports else ()
    return {name: _ratio([report[name] for report in reports], group) for name in names}


def _ratio(pairs: list[Tensor], group: Any) -> float:
    """As Megatron averages (sum, count) reports, over micro-batches and data-parallel ranks."""
    total = torch.stack(pairs).sum(0)
    dist.all_reduce(total, group=group)
    return float(total[0] / total[1])
