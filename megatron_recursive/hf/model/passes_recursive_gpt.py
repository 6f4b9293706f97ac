"""What the model reads of its plan, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_recursive_gpt import RecursiveGPTConfig


class PlanPass(NamedTuple):
    """One application of all layers: ``state[target] = layers(sum of what it reads)``. Fields as in the plan."""

    block: int
    target: str
    reads: tuple[str, ...]
    grad: bool
    cuts_states: bool
    supervised_weight: float
    halt_weight: float
    ends_block: bool


def read_passes(config: RecursiveGPTConfig) -> list[PlanPass]:
    found, passes = [], config.plan["passes"]
    for each, after in zip(passes, [*passes[1:], None], strict=True):
        ends_block = after is None or after["block"] != each["block"]
        found.append(PlanPass(
            each["block"], each["target"], tuple(each["reads"]), each["grad"], each.get("cuts_states", False),
            each.get("supervised_weight", 0.0), each.get("halt_weight", 0.0), ends_block,
        ))  # fmt: skip
    return found


@dataclass
class RecursiveGPTModelOutput(BaseModelOutputWithPast):
    """``block_states``: output states after the blocks, as the plan leaves them; ``blocks``: [B, S] blocks run."""

    block_states: tuple[Tensor, ...] | None = None
    blocks: Tensor | None = None


@dataclass
class RecursiveGPTOutput(CausalLMOutputWithPast):
    """Beside what every causal model returns:

    Attributes:
        loss: the training objective: supervised blocks, plus halt_loss_weight times the halting loss.
        lm_loss: cross-entropy after the last block. halt_loss: of the halting head, as the plan weighs the blocks.
        block_logits: [T, B, S, V], on ``output_blocks=True``: what the model would say after each block.
        block_halting: [T, B, S], on ``output_blocks=True``: halting probability after each block (None: no head).
        blocks: [B, S], under an exit: blocks that each token took.
    """

    lm_loss: Tensor | None = None
    halt_loss: Tensor | None = None
    block_logits: Tensor | None = None
    block_halting: Tensor | None = None
    blocks: Tensor | None = None
