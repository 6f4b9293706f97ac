"""Small random models as Hugging Face folders, with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
POSITIONS = 48


def write_tokenizer(folder: Path, template: str | None = None, eos: str = "<|end|>") -> Any:
    """Byte-level, 257 ids: 0 ends texts, 1 and up are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {eos: 0, **{byte: 1 + number for number, byte in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template)
    fast.save_pretrained(folder)
    return fast


def write_recursive(folder: Path, template: str | None = None, **knobs: Any) -> Path:
    """Our model with 3 blocks, halting head included, whose halting probabilities differ from token to token."""
    import torch

    from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig
    from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM
    from megatron_recursive.plan import RecursionConfig, build_plan

    torch.manual_seed(3)
    recursion = RecursionConfig(num_refinement_blocks=3, num_latent_refinements=1, **knobs)
    recursion = recursion.resolved(embedding_init_std=0.02)
    config = RecursiveGPTConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_layers=2, num_attention_heads=4,
        max_position_embeddings=POSITIONS, eos_token_id=0, plan=json.loads(build_plan(recursion).to_json()),
        recursion=recursion.to_dict(), initializer_range=0.2,
    )  # fmt: skip
    model = RecursiveGPTForCausalLM(config)
    if model.halting_head is not None:
        torch.nn.init.normal_(model.halting_head.weight, std=0.5)
        torch.nn.init.zeros_(model.halting_head.bias)
    model.save_pretrained(folder)
    write_tokenizer(folder, template)
    return folder


def write_plain(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=POSITIONS, bos_token_id=None, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
