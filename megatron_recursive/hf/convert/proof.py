"""Logits of both worlds on a fixed text, with one module's parameters in memory at a time.

A model is built without storage for its parameters, which accelerate's hooks hand to each module while it runs, so that
the forward pass itself is transformers' own, or Megatron's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_recursive.backends import cpu
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.mappings import OWN, Family
from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.added_parameters import EVERY
from megatron_recursive.plan.lora import LoRA

TOLERANCE = 1e-4  # of the largest absolute logit
MAX_TOKENS = 48
TEXT = (
    "A converter that copies weights must show that nothing was lost on the way. The capital of France is Paris, "
    "2 + 2 = 4, and def f(x): return x * x is a function; the rest of this sentence is here to fill the context."
)
BUFFERS = tuple(each.key for each in EVERY if not each.trained)  # of the Megatron model
Fetch = Callable[[str], Tensor]


@dataclass(frozen=True)
class Text:
    """The fixed text, a row for each place in the context: ids and positions, both [3, S]."""

    tokens_BS: Tensor
    positions_BS: Tensor


def proof_text(vocab_size: int, tokenizer: Any, max_positions: int) -> Text:
    """The fixed text at the start of the context, at its end, and spread over all of it.

    Rotary attention depends on distances alone: only the third row has those for which positions are scaled. Without a
    tokenizer the ids are fixed ones, spread over the vocabulary.
    """
    length = min(MAX_TOKENS, max_positions)
    ids = [] if tokenizer is None else [i for i in tokenizer(TEXT)["input_ids"] if i < vocab_size][:length]
    if len(ids) < min(8, length):
        ids = [(7919 * (index + 1) + index * index) % vocab_size for index in range(length)]
    start = torch.arange(len(ids))
    spread = start * (max_positions - 1) // max(len(ids) - 1, 1)
    return Text(torch.tensor([ids] * 3), torch.stack([start, start + max_positions - len(ids), spread]))


def hf_logits(family: Family, config: Any, fetch: Fetch, text: Text, dtype: torch.dtype) -> Tensor:
    """Logits [3, S, V] of transformers' class of a family; ``fetch`` gives a tensor by its name in the files."""

    if family.own_class and family is not OWN:
        from megatron_recursive.hf.convert.published_looped import by_our_names

        fetch = by_our_names(family, config, fetch)

    def build() -> Any:
        if family.own_class:
            from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM

            config._attn_implementation = "sdpa"
            return RecursiveGPTForCausalLM(config)
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)

    model = _offloaded(build, fetch if family.recursion is None else family.recursion.parameters(fetch), dtype)
    with torch.no_grad():
        # Without a mask positions that jump would be taken for several texts in one row.
        return model(input_ids=text.tokens_BS, position_ids=text.positions_BS, use_cache=False,
                     attention_mask=torch.ones_like(text.tokens_BS)).logits  # fmt: skip


def megatron_logits(
    arch: Architecture, recursion: RecursionConfig, fetch: Fetch, text: Text, dtype: torch.dtype,
    lora: LoRA | None = None,
) -> Tensor:  # fmt: skip
    """Logits [3, S, true V] of our Megatron model.

    Args:
        fetch: gives a parameter by its checkpoint key, that of a layer as ``decoder.layers.{i}.<rest of the key>``.

    Raises:
        UserError: Megatron has been left to see a GPU, where it would put what belongs beside these weights.
    """
    if torch.cuda.is_available() and not cpu.is_installed():
        raise UserError("The proof runs on the CPU: call backends.cpu.install(on_purpose=True) before it.")
    with one_process():
        model = _offloaded(
            lambda: build_megatron(arch, recursion, dtype, lora=lora), lambda name: fetch(checkpoint_key(name)), dtype
        )
        if arch.tied:
            _give_tied_weight(model, fetch, dtype)
        _rotate_at(model, text.positions_BS)
        with torch.no_grad():
            logits = model(text.tokens_BS, text.positions_BS, None)
    return logits[..., : arch.vocab_size]


def loss(logits_BSV: Tensor, text: Text) -> float:
    """Mean cross-entropy of the next token, at the start of the context."""
    return float(F.cross_entropy(logits_BSV[0, :-1].double(), text.tokens_BS[0, 1:]))


def relative_error(reference: Tensor, other: Tensor) -> float:
    """Largest difference over the largest absolute logit; NaN where either holds one."""
    difference = (reference.double() - other.double()).abs().max()
    return float(difference / reference.double().abs().max())


def check(error: float, what: str) -> None:
    if not error <= TOLERANCE:  # NaN fails too
        raise UserError(
            f"The proof failed: logits of {what} differ by {error:.3g} of the largest, more than {TOLERANCE:g}; "
            "nothing was written (--proof-dtype float64 tells rounding, which passes amplify, from a difference)."
        )


# --- models without storage -----------------------------------------------------------------------------------------


class _Weights(Mapping[str, Tensor]):
    """A model's parameters by name, read when they are asked for."""

    def __init__(self, names: Iterable[str], fetch: Fetch) -> None:
        self.names, self.fetch = [*names], fetch

    def __getitem__(self, name: str) -> Tensor:
        return self.fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _offloaded(build: Callable[[], Any], fetch: Fetch, dtype: torch.dtype) -> Any:
    """A model without storage; each module gets its parameters just before it runs and gives them back right after."""
    with accelerate.init_empty_weights(include_buffers=False):
        model = build().to(dtype).eval()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name, buffer in model.named_buffers():
        if name in BUFFERS:
            buffer.data = fetch(name).to(dtype)
    return accelerate.cpu_offload(
        model, torch.device("cpu"), state_dict=_Weights(names, fetch),
        preload_module_classes=["TransformerLayer"],  # Megatron's: parts of it use each other's parameters
    )  # fmt: skip


# --- Megatron -------------------------------------------------------------------------------------------------------

_KEYS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    ("output_norm.", "decoder.final_layernorm."),
)


def checkpoint_key(parameter: str) -> str:
    """The checkpoint key of a parameter of the model with the local layer spec (its layer number still in it)."""
    for name, key in _KEYS:
        parameter = parameter.replace(name, key) if name.startswith(".") or parameter.startswith(name) else parameter
    return parameter


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Megatron's process groups, in a world of one process; a world that is there already is used."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError("The converter runs in one process; start it without torchrun.")
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = not parallel_state.model_parallel_is_initialized()
    if groups:
        parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        if groups:
            parallel_state.destroy_model_parallel()
        if ours:
            dist.destroy_process_group()


def build_megatron(
    arch: Architecture, recursion: RecursionConfig, dtype: torch.dtype, tp: int = 1, pp: int = 1, whole: bool = False,
    lora: LoRA | None = None,
) -> Any:  # fmt: skip
    """The Megatron model, or this rank's part of it, with the local layer spec; its parameters are not initialised.

    ``whole``: all of it, whatever pipeline stage of another model this rank is.
    """
    from megatron.core import parallel_state
    from megatron.core.activations import squared_relu

    from megatron_recursive.models.layer_specs import local_block_spec
    from megatron_recursive.models.norm_placement import NormLayout
    from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel, RecursiveTransformerConfig

    activations: dict[str, Any] = {
        "silu": F.silu, "gelu": F.gelu, "relu2": squared_relu,
        "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }  # fmt: skip
    config = RecursiveTransformerConfig(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads, num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim, normalization="RMSNorm" if arch.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=arch.norm_eps, layernorm_zero_centered_gamma=arch.norm_one_centered,
        gated_linear_unit=arch.gated, activation_func=activations[arch.activation],
        norm_weights=arch.norm_weights, attention_output_gate=arch.attention_gate, add_bias_linear=arch.linear_bias,
        add_qkv_bias=arch.qkv_bias, qk_layernorm=arch.qk_norm is not None,
        params_dtype=dtype, use_cpu_initialization=True, perform_initialization=False, hidden_dropout=0.0,
        attention_dropout=0.0, bias_dropout_fusion=False, bias_activation_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, apply_rope_fusion=False, persist_layer_norm=False, transformer_impl="local",
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pipeline_dtype=dtype,
        lora=lora,
    )  # fmt: skip
    if arch.yarn is not None:  # what Megatron sets where it makes a config of its arguments; attention reads it too
        for name, value in arch.yarn.to_megatron().items():
            setattr(config, name if name.startswith("yarn_") else f"yarn_{name}", value)
    norms = NormLayout(arch.norm_placement, arch.output_norm_scope, arch.qk_norm or "head")
    return RecursiveGPTModel(
        config, local_block_spec(config, norms=norms), arch.padded_vocab_size, arch.max_positions,
        position_embedding_type=arch.position_embedding_type,
        rotary_percent=arch.rotary_percent, rotary_base=arch.rotary_base,
        rope_scaling=arch.llama3_factor is not None, rope_scaling_factor=arch.llama3_factor or 8.0,
        seq_len_interpolation_factor=arch.linear_factor, share_embeddings_and_output_weights=arch.tied,
        pre_process=whole or parallel_state.is_pipeline_first_stage(),
        post_process=whole or parallel_state.is_pipeline_last_stage(),
        recursion=recursion,
    )  # fmt: skip


def _rotate_at(model: Any, positions_BS: Tensor) -> None:
    """Megatron rotates by the place in the row, whatever positions it is given; hand it the angles of these."""

    def replace(rotary: Any, _: Any, found: Any) -> Any:
        is_pair = isinstance(found, tuple)  # YaRN's comes with a factor

        def at(position: int) -> Tensor:
            angles = rotary.forward(1, offset=position)
            return angles[0] if is_pair else angles

        rows = [torch.cat([at(position) for position in row]) for row in positions_BS.tolist()]
        angles_SB1D = torch.cat(rows, dim=1)
        return (angles_SB1D, *found[1:]) if is_pair else angles_SB1D

    if getattr(model, "rotary_pos_emb", None) is not None:
        model.rotary_pos_emb.register_forward_hook(replace)


def _give_tied_weight(model: Any, fetch: Fetch, dtype: torch.dtype) -> None:
    """GPTModel hands the embedding's weight to the output layer, when the embedding has already given it back."""

    def replace(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "weight": fetch("embedding.word_embeddings.weight").to(dtype)}

    model.output_layer.register_forward_pre_hook(replace, with_kwargs=True)
