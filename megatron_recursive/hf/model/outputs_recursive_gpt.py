"""What recursive GPTs return. Ships inside an export: it imports torch and transformers alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class RecursiveGPTModelOutput(BaseModelOutputWithPast):
    """``block_states``: output states after the blocks, as the plan leaves them; ``blocks``: [B, S] blocks run."""

    block_states: tuple[Tensor, ...] | None = None
    blocks: Tensor | None = None


@dataclass
class RecursiveGPTOutput(CausalLMOutputWithPast):
    """Beside what every causal model returns:

    Attributes:
        loss: the training objective: supervised blocks, plus halt_loss_weight times the halting loss; or the expected
            loss over the loops at which an exit gate leaves.
        lm_loss: cross-entropy after the last block. halt_loss: of the halting head, as the plan weighs the blocks.
        block_logits: [T, B, S, V], on ``output_blocks=True``: what the model would say after each block.
        block_halting: [T, B, S], on ``output_blocks=True``: halting probability after each block; of an exit gate, the
            probability of having left by then (None: no head).
        blocks: [B, S], under an exit: blocks that each token took.
    """

    lm_loss: Tensor | None = None
    halt_loss: Tensor | None = None
    block_logits: Tensor | None = None
    block_halting: Tensor | None = None
    blocks: Tensor | None = None
