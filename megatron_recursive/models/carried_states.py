"""What a training step leaves of its micro-batches for the next one on the same batch (``--num-supervision-steps``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class CarriedStates:
    """The states of each micro-batch, detached, in the order in which a step runs them.

    The first stage holds the states; the last one holds the output until the end of the step, when it is sent to the
    first, and who has halted. A step may run again (Megatron's rerun state machine): it then starts at the same states,
    so that what it leaves stands beside them until the next :meth:`begin`.
    """

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.states: dict[str, list[Tensor]] = {}  # where this step starts, by name: [S, B, H] of each micro-batch
        self.left: dict[str, list[Tensor]] = {}
        self.halted: list[Tensor] = []  # last stage: [B], whether all of a sample's tokens that count have halted
        self.fresh: Sequence[Tensor] | None = None  # [B] of each: the samples that start anew; None: none does
        self.like: tuple[torch.Size, torch.dtype, torch.device] | None = None  # of a state
        self._started = 0

    def begin(self, fresh: Sequence[Tensor] | None, *, anew: bool) -> None:
        """A step begins: on a new batch (``anew``), or where the last one ended, but for the samples ``fresh``."""
        self.states = {} if anew else {name: self.last(found) for name, found in self.left.items()}
        self.left, self.halted, self.fresh = {}, [], fresh

    def last(self, found: list[Tensor]) -> list[Tensor]:
        """Those of the last time that the step ran."""
        return found[-self.micro_batches :]

    def start(self, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the next micro-batch starts, given where fresh samples do ([S, B, H])."""
        number, self._started = self._started % self.micro_batches, self._started + 1
        given = dict(initial)
        self.like = next((state.shape, state.dtype, state.device) for state in initial.values())
        for name, states in self.states.items():
            given[name] = states[number]
            if self.fresh is not None:
                given[name] = torch.where(self.fresh[number][None, :, None], initial[name], states[number])
        return given

    def leave(self, name: str, state_SBH: Tensor) -> None:
        """Where the next micro-batch that ends does so."""
        self.left.setdefault(name, []).append(state_SBH.detach())
