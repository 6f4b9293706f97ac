"""The exponential moving average of the weights: of the fp32 ones that the optimizer of a rank moves, beside them.

``average <- d average + (1 - d) weight`` after each step that is taken. It starts at the weights before the first one.
Megatron 0.19 has none. It is kept apart from the optimizer's own state, of which fused optimizers know every name, and
goes through Megatron's checkpoints as one more tensor for each weight, ``optimizer.state.ema.KEY``. For that the
methods by which an optimizer reads and writes checkpoints are wrapped, and a ``DistributedOptimizer`` takes a class
that names the tensor.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

NAME = "ema"


class WeightAverage:
    """The average beside one of Megatron's optimizers, by (fp32, sharded) weight.

    Attributes:
        is_stored: whether the checkpoint that is read holds it; otherwise it starts anew from what is read.
    """

    def __init__(self, optimizer: Any, decay: float) -> None:
        self.optimizer, self.is_stored, self.is_named = optimizer, True, False
        self._of: dict[Tensor, Tensor] = {}
        if isinstance(optimizer, DistributedOptimizer):
            self._between("_get_main_param_and_optimizer_states", self._add_shard)
            self._between("_set_main_param_and_optimizer_states", self._take_shard)
            self._between("get_parameter_state_dp_zero", self._gather)
            optimizer.__class__, optimizer.weight_average = _naming_it(type(optimizer)), self
        else:
            self._between("sharded_state_dict", self._add_tensors)
            self._between("load_state_dict", self._take_tensors)
        if optimizer.optimizer is not None:
            optimizer.optimizer.register_step_pre_hook(lambda *_: self.follow(1.0))  # there from before the first
            optimizer.optimizer.register_step_post_hook(lambda *_: self.follow(decay))

    def weights(self) -> list[Tensor]:
        groups = [] if self.optimizer.optimizer is None else self.optimizer.optimizer.param_groups
        return [weight for group in groups for weight in group["params"]]

    def of(self, weight: Tensor) -> Tensor:
        if weight not in self._of:
            self._of[weight] = weight.detach().clone()
        return self._of[weight]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        for weight in self.weights():
            average = self.of(weight)
            if decay < 1:
                average.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Weights and averages change places, also in the model, where other ranks' are still to be gathered."""
        for weight in self.weights():
            average, kept = self.of(weight), weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)
        if hasattr(self.optimizer, "_copy_main_params_to_model_params"):
            self.optimizer._copy_main_params_to_model_params()

    # -- checkpoints: one more tensor where Megatron asks its optimizer for what it has ---------------------------

    def _between(self, method: str, ours: Callable[..., Any]) -> None:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # Looked up when called: patches/adam.py replaces one of them while a checkpoint is read.
            return ours(partial(getattr(type(self.optimizer), method), self.optimizer), *args, **kwargs)

        setattr(self.optimizer, method, wrapper)

    def _main(self, model_param: Tensor) -> Tensor:
        group, order = self.optimizer.model_param_group_index_map[model_param]
        weight: Tensor = self.optimizer.optimizer.param_groups[group]["params"][order]
        return weight

    def _add_shard(self, original: Callable[..., Any], model_param: Tensor) -> dict[str, Tensor]:
        average = {NAME: self.of(self._main(model_param))} if self.is_stored else {}
        return {**original(model_param), **average}

    def _gather(self, original: Callable[..., Any], **more: Any) -> Any:
        self.is_named = self.is_stored
        try:
            return original(**more)
        finally:
            self.is_named = False

    def _take_shard(self, original: Callable[..., Any], model_param: Tensor, tensors: dict[str, Any]) -> None:
        average = tensors.pop(NAME, None)
        original(model_param, tensors)
        self._of.pop(self._main(model_param), None)
        if average is not None:
            self.of(self._main(model_param)).copy_(average)

    def _add_tensors(
        self, original: Callable[..., Any], model_sharded: Any, is_loading: bool = False, **more: Any
    ) -> Any:
        state = original(model_sharded, is_loading, **more)
        if self.is_stored:
            held = getattr(self.optimizer, "float16_groups", None)
            params = self.optimizer.get_parameters() if held is None else chain.from_iterable(held)
            sharded = get_param_id_to_sharded_param_map(model_sharded, params)
            state[NAME] = {
                index: make_sharded_optimizer_tensor(sharded[index], self.of(weight), prefix=f"optimizer.state.{NAME}")
                for index, weight in enumerate(self.weights())
            }
        return state

    def _take_tensors(self, original: Callable[..., Any], state: dict[str, Any]) -> None:
        averages = state.pop(NAME, {})
        original(state)
        self._of.clear()
        for index, weight in enumerate(self.weights()):
            if index in averages:
                self.of(weight).copy_(averages[index])


def _naming_it(kind: type) -> type:
    """The optimizer's class, but while it gathers tensors of weights, the average is one of those that it names."""

    def optimizer_state_keys(self: Any) -> tuple[str, ...]:
        own: tuple[str, ...] = kind.optimizer_state_keys.fget(self)  # type: ignore[attr-defined]
        return (*own, NAME) if self.weight_average.is_named else own

    return types.new_class(kind.__name__, (kind,), {}, lambda body: body.update(
        optimizer_state_keys=property(optimizer_state_keys)))  # fmt: skip


def averages_of(optimizer: Any, decay: float) -> list[WeightAverage]:
    """An average beside each of the optimizers that Megatron has chained."""
    return [WeightAverage(each, decay) for each in getattr(optimizer, "chained_optimizers", [optimizer])]


@contextmanager
def in_place(averages: Sequence[WeightAverage], chunks: Sequence[Any]) -> Iterator[None]:
    """The model has the averaged weights, and afterwards its own again, bit for bit. Every rank calls it."""
    _exchange(averages, chunks)
    try:
        yield
    finally:
        _exchange(averages, chunks)


@contextmanager
def read_where_stored(averages: Sequence[WeightAverage], *, stored: bool) -> Iterator[None]:
    """While a checkpoint is read, which holds averages or not; those that it does not hold start at its weights."""
    for average in averages:
        average.is_stored = stored
    yield
    for average in averages:
        average.is_stored = True


def _exchange(averages: Sequence[WeightAverage], chunks: Sequence[Any]) -> None:
    for average in averages:
        average.exchange()
    for chunk in chunks if averages else ():
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
