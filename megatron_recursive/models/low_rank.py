"""The adapters of ``plan/lora.py`` in Megatron's layers, in any layout the same function and the same start.

An adapter adds to the product of its matrix where that still is a rank's own: in front of the sum of a row-parallel
layer, and of a norm behind it. Megatron 0.19 has no hook there, so that ``_forward_impl`` of its own linears (the local
layer spec) is replaced.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_recursive.models.uses import Uses
from megatron_recursive.plan.lora import MODULE, SHARED, TARGETS, LoRA


class LowRank(MegatronModule):
    """``alpha / rank B A x`` of one matrix, for each of its names. The small factor lies on every tensor-parallel rank.

    Column-parallel: B has this rank's rows, and what A makes is the same on all ranks. Under sequence parallelism A
    sees this rank's tokens, and Megatron sums its gradients. Row-parallel: A has this rank's columns, and what B makes
    is summed with the layer's own.
    """

    def __init__(self, config: Any, linear: Any, where: str, names: tuple[str, ...]) -> None:
        super().__init__(config=config)
        lora: LoRA = config.lora
        self.scale, self.layer, self.tp_group = lora.scale, int(where.partition(".")[0]), linear.tp_group
        self.by_columns = isinstance(linear, ColumnParallelLinear)
        self.gathers = self.by_columns and linear.sequence_parallel
        self.halves = config.gated_linear_unit and where.endswith("linear_fc1")
        rows, columns = linear.weight.shape
        ranks, rank = self.tp_group.size(), self.tp_group.rank()
        whole = columns if self.by_columns else columns * ranks
        self.names = names
        for name in names:
            digest = hashlib.sha256(f"{lora.seed} {where} {name}".encode()).digest()
            generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7], "little"))
            fresh = torch.empty(lora.rank, whole, device="cpu").uniform_(-1, 1, generator=generator) / whole**0.5
            mine = fresh if self.by_columns else fresh.chunk(ranks, dim=1)[rank]
            # The module's own: a ParameterDict is never called, and DDP waits for the parameters of what is.
            self.register_parameter(f"A_{name}", torch.nn.Parameter(mine.contiguous().to(linear.weight)))
            self.register_parameter(f"B_{name}", torch.nn.Parameter(linear.weight.new_zeros(rows, lora.rank)))
            down, up = self.factors(name)
            down.sequence_parallel = self.gathers  # type: ignore[attr-defined]
            set_tensor_model_parallel_attributes(*((up, True, 0, 1) if self.by_columns else (down, True, 1, 1)))

    def forward(self, x: Tensor, name: str) -> Tensor:
        """Of the linear's input, as it is given to this rank, what is added to this rank's product."""
        down, up = self.factors(name)
        low = F.linear(x, down) * self.scale
        if self.gathers:
            low = tensor_parallel.gather_from_sequence_parallel_region(low, group=self.tp_group)
        elif self.by_columns:
            low = tensor_parallel.copy_to_tensor_model_parallel_region(low, self.tp_group)
        else:  # each rank has a part of low, which makes a part of the gradient of B
            up = tensor_parallel.copy_to_tensor_model_parallel_region(up, self.tp_group)
        return F.linear(low, up)

    def factors(self, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        return self.get_parameter(f"A_{name}"), self.get_parameter(f"B_{name}")

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """A key for each layer, in place of Megatron's one for all: of several stacks each has passes of its own."""
        state, group = self.state_dict(prefix="", keep_vars=True), ensure_metadata_has_dp_cp_group(metadata)
        axes = {name: 0 if self.by_columns else 1 for name in state if name.startswith("B") == self.by_columns}
        sharded = make_sharded_tensors_for_checkpoint(
            state, prefix, axes, (), tp_group=self.tp_group, dp_cp_group=group["dp_cp_group"]
        )
        for name, value in sharded.items():
            if self.halves and name.startswith(f"{prefix}B_"):
                value = sharded[name] = apply_swiglu_sharded_factory(value, (), tp_group=self.tp_group)
            value.key = value.key.replace(f".{MODULE}.", f".{self.layer}.{MODULE}.")  # Megatron takes its own off
        return sharded


def add_adapters(model: Any) -> None:
    """Give the layers of a model the adapters of its config, and freeze all other weights."""
    lora: LoRA = model.config.lora
    model.requires_grad_(False)
    if model.plan.is_plain and model.pre_process:  # what needs no gradient, a full recompute takes for frozen
        model.embedding.register_forward_hook(lambda _, __, found: found.requires_grad_(torch.is_grad_enabled()))
    for layer in model.decoder.layers:
        number, adapters = layer.layer_number - 1, MegatronModule(config=model.config)
        names = lora.names(model.plan, model.config.num_layers, number)
        for target in lora.targets:
            linear: Any = layer.get_submodule(TARGETS[target])
            low_rank = LowRank(model.config, linear, f"{number}.{target}", names)
            setattr(adapters, target, low_rank)
            linear._forward_impl = partial(_beside, linear._forward_impl, low_rank, model.uses)
        setattr(layer, MODULE, adapters)


def of_pass(part: str, index: int | str) -> str:
    """The name of a part's adapters of one pass, as a part of its own."""
    return f"{part} of pass {index}"


def adapters_by_pass(block: torch.nn.Module, part: str) -> dict[str, set[torch.nn.Parameter]]:
    """The adapters of a block's layers that belong to one pass, by part."""
    found: dict[str, set[torch.nn.Parameter]] = {}
    for low_rank in (module for module in block.modules() if isinstance(module, LowRank)):
        for name in low_rank.names:
            found.setdefault(of_pass(part, name), set()).update(low_rank.factors(name))
    return found


def _beside(product: Any, low_rank: LowRank, uses: Uses, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A linear's product, and what its adapter adds in the pass that is under way (or replayed)."""
    result: Tensor = product(input, *args, **kwargs)
    name = SHARED if SHARED in low_rank.names else (uses.current or "").rpartition(" ")[2]
    return result + low_rank(input, name) if name in low_rank.names else result
