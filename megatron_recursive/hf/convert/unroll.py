"""Unroll: a model whose passes form a chain, as a plain GPT that holds every layer that a token goes through."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.donor_import import PLAIN
from megatron_recursive.hf.convert.export import MegatronModel, write_model
from megatron_recursive.hf.convert.report import Report
from megatron_recursive.hf.convert.safetensors_files import SHARD_BYTES
from megatron_recursive.hf.convert.torch_dist import LAYERS, TorchDistCheckpoint
from megatron_recursive.hf.convert.verify import Side, open_side
from megatron_recursive.plan import DecoderPass, RecursionPlan
from megatron_recursive.plan.lora import MODULE as ADAPTERS
from megatron_recursive.plan.recursion_plan import OF_TRAINING, STATES

EMBEDDING = "embedding.word_embeddings.weight"
# Words of the plan that chain() reads, and those that only training and heads read; any other is refused.
KNOWN = {
    *"stacks passes state_init state_std state_norm embedding_multiplier stack target reads step".split(),
    *"family mean_steps exit_gate".split(), *OF_TRAINING,
}  # fmt: skip


def unroll_model(
    src: str, out: str, proof_dtype: torch.dtype | None = torch.float32, say: Callable[[str], None] = print,
    shard_bytes: int = SHARD_BYTES, tokenizer: str | None = None,
) -> Report:  # fmt: skip
    """Write the passes of a model out as layers, prove the logits, and put the folder at ``out``.

    The class is a donor's where one computes the layers; a factor on the embedding goes into its weights.

    Raises:
        UserError: the plan is no chain of layers, or what else is wrong; nothing is left at ``out``.
    """
    side = open_side(src)
    if side.plan.is_plain:
        raise UserError(f"{src} is a plain GPT already; there is nothing to unroll.")
    if any(f".{ADAPTERS}." in key for key in side.tensors):
        raise UserError(f"{src} has an adapter for each pass (--lora-per-pass), which unrolled layers would lose.")
    layers = chain(side.plan, side.arch.num_layers)
    tied = side.arch.tied and side.plan.embedding_multiplier == 1
    arch = replace(side.arch, num_layers=len(layers), tied=tied, padded_vocab_size=side.arch.vocab_size)
    held = _Unrolled(side, arch, layers)
    left = [key for key in side.tensors if not key.startswith(LAYERS) and key not in held.dtypes]
    say(f"{src}: {side.arch.num_layers} layers in {side.plan.num_passes} passes become {len(layers)} layers, "
        f"{held.nbytes:,} bytes; left behind: {', '.join(left) or 'nothing'}")  # fmt: skip
    return write_model(MegatronModel(held, side.args, arch, PLAIN), Path(src), Path(out), tokenizer, proof_dtype,
                       say, shard_bytes, lambda text, dtype: side.logits(text, dtype, None))  # fmt: skip


def chain(plan: RecursionPlan, num_layers: int) -> list[int]:
    """The layers that a token goes through, where each pass replaces a state by what it makes of the last result.

    Raises:
        UserError: a pass does something else; the plan's word for it is named.
    """
    no = "This plan cannot be unrolled to a chain of layers"
    both: list[RecursionPlan | DecoderPass] = [plan, *plan.passes]
    for value, word in ((getattr(each, word.name), word) for each in both for word in fields(each)):
        if word.name not in KNOWN and value != word.default:
            raise UserError(f"{no}: it has {word.name} {value}.")
    if plan.state_norm != "none" and (plan.num_passes > 1 or plan.state_norm != "final"):
        raise UserError(f"{no}: it has state_norm {plan.state_norm}, a norm that closes passes.")
    stacks, newest = plan.layers_of(num_layers), 0
    layers: list[int] = []
    # What each state holds: the result of pass 1, 2, ..., the embedding (0), zeros (None), or something else (-1).
    zeros = not (plan.initial_vectors or plan.samples_start)
    states = {"input": 0, **dict.fromkeys(STATES, None if zeros else -1)}
    states["output"] = 0 if plan.starts_at_input else states["output"]
    for p in plan.passes:
        if [states[name] for name in p.reads if states[name] is not None] != [newest]:
            raise UserError(f"{no}: pass {p.index + 1} ({p.stack}) reads {' + '.join(p.reads)} "
                            f"(state_init {plan.state_init}).")  # fmt: skip
        if not p.replaces_state:
            raise UserError(f"{no}: pass {p.index + 1} ({p.stack}) moves its state by the step {p.step:.3g}.")
        newest = states[p.target] = p.index + 1
        if p.target == "input" and plan.starts_at_input:
            states["output"] = newest
        layers += stacks[p.stack]
    return layers


class _Unrolled(TorchDistCheckpoint):
    """The tensors of a model, as the checkpoint that an export reads: layer i is the i-th that a token goes through."""

    def __init__(self, side: Side, arch: Architecture, layers: list[int]) -> None:
        self.folder, self.bytes_read, self.training_state = Path(side.name), 0, 0
        self._side, self._layers, self._factor = side, layers, side.plan.embedding_multiplier
        items = [*MegatronModel(self, {}, arch, PLAIN).items()]
        self._scaled = {item.key for item in items if item.key.startswith("embedding.") and self._factor != 1}
        stored = {item.key: side.dtypes.get(item.key, side.dtypes[EMBEDDING]) for item in items}
        self.dtypes = {**stored, **dict.fromkeys(self._scaled, torch.float32)}
        self.nbytes = sum(math.prod(item.megatron_shape(arch)) * self.dtypes[item.key].itemsize for item in items)

    def get(self, key: str, layer: int | None = None) -> Tensor:
        name = key if layer is None else f"{LAYERS}{self._layers[layer]}.{key.removeprefix(LAYERS)}"
        tensor = self._side.tensors.get(name, self._side.tensors[EMBEDDING])()  # a head that was tied is the embedding
        self.bytes_read += tensor.nbytes
        return tensor.float() * self._factor if key in self._scaled else tensor
