"""The recursion core: walks a plan over states. It knows neither attention nor vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from megatron_recursive.plan import DecoderPass, RecursionPlan
from megatron_recursive.plan.recursion_plan import STATES


def expanded(vector_H: Tensor | None, like_SBH: Tensor) -> Tensor:
    """An initial state, [S, B, H], without memory of its own. None is zero."""
    return (like_SBH.new_zeros(()) if vector_H is None else vector_H.to(like_SBH)).expand_as(like_SBH)


class RecursionState:
    """The output and latent states of one micro-batch while its plan runs. All are [S, B, H].

    ``combine`` and ``move`` do what a pass says that is no sum, and no step.
    """

    def __init__(
        self, embedding_SBH: Tensor, initial: Mapping[str, Tensor], *, starts_at_input: bool = False,
        combine: Callable[..., Tensor] | None = None, move: Callable[..., Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.combine, self.move = combine, move
        self.values: dict[str, Tensor] = {"input": embedding_SBH}
        for name in STATES:
            self.values[name] = expanded(initial.get(name), embedding_SBH)
        if starts_at_input:  # whatever the input is by the time that the output is read
            del self.values["output"]

    @property
    def output(self) -> Tensor:
        return self.values["output"]

    def gather(self, decoder_pass: DecoderPass) -> Tensor:
        """What the pass feeds to the decoder."""
        if "output" in decoder_pass.reads:
            self.values.setdefault("output", self.values["input"])
        if decoder_pass.cuts_states:
            for name in STATES:
                self.values[name] = self.values[name].detach()
        read = [self.values[name] for name in decoder_pass.reads]
        if torch.is_grad_enabled() and len({id(value) for value in read}) < len(read):
            # An output that begins as the input: what the pass says of it is one gradient, as over stages.
            once = {id(value): value.clone() for value in read}
            read = [once[id(value)] for value in read]
        first, *others = read
        if decoder_pass.combine == "sum":
            # A tensor of its own also where nothing is added: a ring frees states.
            total = first.contiguous().view_as(first)
            for other in others:
                total = total + other
        else:
            assert self.combine is not None
            total = self.combine(decoder_pass, first, *others)
        if torch.is_grad_enabled() and not total.requires_grad:
            # Megatron's full recompute gives the layers no gradient when nothing that they read asks for one.
            total = total.detach().requires_grad_()
        return total

    def update(self, decoder_pass: DecoderPass, result_SBH: Tensor) -> None:
        # Megatron's blocks may mark an output of a grad-free pass as requiring gradient; it must not reach the graph.
        values = (result_SBH, *(self.values[name] for name in decoder_pass.moved_with))
        moved, *others = values if decoder_pass.grad else (value.detach() for value in values)
        if decoder_pass.move != "step":
            assert self.move is not None
            moved = self.move(decoder_pass, moved, *others)
        elif not decoder_pass.replaces_state:
            (before,) = others
            moved = before + decoder_pass.step * (moved - before)
        self.values[decoder_pass.target] = moved


def run_plan(
    plan: RecursionPlan, state: RecursionState, decode: Callable[[DecoderPass, Tensor], Tensor], first: int = 0,
    stop: int | None = None,
) -> Iterator[DecoderPass]:  # fmt: skip
    """Run every pass in order, or those from ``first`` to before ``stop``; yields after the last pass of each block,
    when ``state.output`` can be read."""
    grad_enabled = torch.is_grad_enabled()
    for decoder_pass in plan.passes[first:stop]:
        with torch.set_grad_enabled(grad_enabled and decoder_pass.grad):
            state.update(decoder_pass, decode(decoder_pass, state.gather(decoder_pass)))
        if plan.is_block_end(decoder_pass):
            yield decoder_pass
