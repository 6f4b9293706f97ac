"""From Megatron's arguments to a model: the config, its builder, and the model's dimensions for accounting."""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import scaled_init_method_normal
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec
from megatron.training.training import update_train_iters

from megatron_recursive.accounting import FlopsPerToken, ModelShape, mean_flops_per_token
from megatron_recursive.errors import UserError
from megatron_recursive.models import compiled_fusions
from megatron_recursive.models.layer_specs import engine_layer_spec, layers_of_stages, local_block_spec
from megatron_recursive.models.norm_placement import NormLayout
from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel, RecursiveTransformerConfig
from megatron_recursive.pipeline.pass_costs import price_passes
from megatron_recursive.plan import RecursionConfig, RecursionPlan, StepPlans, build_plan
from megatron_recursive.plan.lora import LoRA
from megatron_recursive.training.distillation import DistillationSource, source_of
from megatron_recursive.training.norm_arguments import norm_layout


@dataclass(kw_only=True)
class RecursiveGPTModelConfig(GPTModelConfig):
    """Megatron's GPT config and the resolved recursion knobs."""

    builder: ClassVar[str] = "megatron_recursive.training.model_provider.RecursiveGPTModelBuilder"
    recursion: RecursionConfig = field(default_factory=RecursionConfig)
    norms: NormLayout = field(default_factory=NormLayout)
    train_only: str | None = None
    distillation: DistillationSource | None = None

    @property
    def plan(self) -> RecursionPlan:
        plan = build_plan(self.recursion)
        return plan.heads_only() if self.train_only == "heads" else plan

    def step_plans(self, args: argparse.Namespace) -> StepPlans:
        """The plans of the training steps of a run."""
        counted = copy.copy(args)
        update_train_iters(counted)  # from samples and a schedule of batches
        return StepPlans(self.recursion, self.plan, seed=args.seed, iterations=max(counted.train_iters, 1))


class RecursiveGPTModelBuilder(GPTModelBuilder):
    """Megatron's GPT builder with another model class (upstream names GPTModel in ``build_model``)."""

    _model_config: RecursiveGPTModelConfig

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> RecursiveGPTModel:
        config = self._model_config
        model = RecursiveGPTModel(
            config=config.transformer,
            transformer_layer_spec=_layer_spec(config, vp_stage),
            vocab_size=config.vocab_size,
            max_sequence_length=config.seq_length,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
            pre_process=is_pp_first_stage(pg_collection.pp) if pre_process is None else pre_process,
            post_process=is_pp_last_stage(pg_collection.pp) if post_process is None else post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            recursion=config.recursion,
            plan=config.plan,
        )
        if config.distillation is not None and model.post_process:
            rows, dtype = config.vocab_size or 0, config.transformer.params_dtype
            model.distillation = config.distillation.loaded(rows, dtype, pg_collection.tp)
        if config.transformer.use_cpu_initialization:  # Megatron 0.19.2 then leaves it where it was made
            model.cuda(torch.cuda.current_device())
        return model


def _layer_spec(config: RecursiveGPTModelConfig, vp_stage: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    """The user's --spec, Transformer Engine's spec, or the local one, as ``--transformer-impl`` says."""
    spec = config.transformer_layer_spec
    if spec is None:
        local = config.transformer.transformer_impl == "local"
        if local:
            return local_block_spec(config.transformer, vp_stage, norms=config.norms)
        return engine_layer_spec(default_layer_spec(config, vp_stage), config.transformer, config.norms)
    if callable(spec) and not isinstance(spec, ModuleSpec):
        takes_stage = "vp_stage" in inspect.signature(spec).parameters
        return spec(config, vp_stage=vp_stage) if takes_stage else spec(config)
    return spec


def _check_spec(words: list[str]) -> None:
    """Megatron goes on without a spec that cannot be imported, and calls whatever else it finds with its config."""
    given = f"--spec {' '.join(words)}"
    if len(words) != 2:
        raise UserError(f"{given} must be two words: a module, and the name of a spec in it.")
    try:
        spec = getattr(importlib.import_module(words[0]), words[1])
    except (ImportError, AttributeError) as error:
        raise UserError(f"{given} cannot be imported ({error}); name a module of PYTHONPATH, and a spec.") from error
    if isinstance(spec, ModuleSpec | TransformerBlockSubmodules):
        return
    parameters = inspect.signature(spec).parameters.values() if callable(spec) else ()
    if [p.name for p in parameters if p.default is p.empty and p.name != "vp_stage"] != ["config"]:
        raise UserError(f"{given} is no layer spec; name a ModuleSpec, or a function of config that returns one.")


def model_config_from_args(args: argparse.Namespace, recursion: RecursionConfig) -> RecursiveGPTModelConfig:
    """The model that validated arguments describe."""
    if args.spec is not None:
        _check_spec(args.spec)
    transformer = core_transformer_config_from_args(args, RecursiveTransformerConfig)
    compiled_fusions.choose(transformer)
    transformer.lora = LoRA.from_args(vars(args))
    plan = build_plan(recursion)
    if recursion.init_depth_scaling == "unrolled":
        unrolled = plan.unrolled_layers(transformer.num_layers)
        transformer.output_layer_init_method = scaled_init_method_normal(transformer.init_method_std, unrolled)
    config = gpt_config_from_args(args, config=transformer, model_config_cls=RecursiveGPTModelConfig)
    config.recursion = recursion
    config.norms = norm_layout(vars(args))
    config.distillation = source_of(args)
    config.train_only = getattr(args, "train_only", None)  # a checkpoint of an earlier version does not say
    # gpt_config_from_args drops it, and a Llama-3.2 checkpoint (factor 32) would silently run with 8.
    config.rope_scaling_factor = args.rope_scaling_factor
    backward = 2.0 + transformer.recompute_passes + (transformer.recompute_granularity == "full")
    shape = model_shape(config, args.seq_length)  # not the positions that a model has
    split = layers_of_stages(transformer)
    transformer.pipeline_costs = partial(price_passes, shape=shape, layers_per_stage=split, backward_cost=backward)
    return config


def model_shape(config: RecursiveGPTModelConfig, seq_length: int) -> ModelShape:
    """The dimensions that accounting needs; the vocabulary is the padded one."""
    transformer: Any = config.transformer
    return ModelShape(
        num_layers=transformer.num_layers,
        hidden_size=transformer.hidden_size,
        ffn_hidden_size=transformer.ffn_hidden_size,
        num_attention_heads=transformer.num_attention_heads,
        num_query_groups=transformer.num_query_groups,
        kv_channels=transformer.kv_channels,
        vocab_size=config.vocab_size or 0,
        seq_length=seq_length,
        learned_positions=config.seq_length if config.position_embedding_type == "learned_absolute" else 0,
        gated_linear_unit=transformer.gated_linear_unit,
        tied_embeddings=config.share_embeddings_and_output_weights,
        linear_bias=transformer.add_bias_linear,
        qkv_bias=transformer.add_qkv_bias,
        qk_norm=transformer.qk_layernorm,
        qk_norm_full=config.norms.qk_norm_scope == "full",
        norm_bias=transformer.normalization == "LayerNorm",
        norms_per_layer=config.norms.norms_per_layer,
        attention_gate=transformer.attention_output_gate,
    )


def training_flops(
    config: RecursiveGPTModelConfig, seq_length: int, plans: Mapping[RecursionPlan, float]
) -> FlopsPerToken:
    """Per token, the mean over training steps of these plans, with how many there are of each."""
    teacher = 0.0 if config.distillation is None else config.distillation.costs(seq_length)[1]
    transformer: Any = config.transformer
    return mean_flops_per_token(model_shape(config, seq_length), plans, teacher, frozen=transformer.lora is not None)
