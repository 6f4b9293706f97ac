"""Caches and generate() at fixed depth: decoding step by step says what one forward says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from megatron_recursive.hf.model.cache_recursive_gpt import RecursiveCache
from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM
from tests.grids import grid
from tests.unit_tests.hf.recursive_models import SHAPES, VOCAB, left_padded, make_model, make_tokens
from tests.unit_tests.models.comparing import relative_error

LENGTH, PREFIX, PADS = 40, 7, [0, 3, 5]
CACHES = ("dynamic", "static", "recursive")


def make_cache(kind: str, model: RecursiveGPTForCausalLM, length: int = LENGTH) -> Cache:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return RecursiveCache(model.config, reserve=8) if kind == "recursive" else DynamicCache(config=model.config)


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def step_by_step(
    model: Any, tokens: Tensor, mask: Tensor, cache: Cache, chunks: tuple[int, ...] = (), **kwargs: Any
) -> list[Any]:
    """Feed a prefix, perhaps more chunks, then token by token; the outputs."""
    outputs, start, positions = [], 0, positions_of(mask)
    for size in (PREFIX, *chunks, *[1] * (tokens.shape[1] - PREFIX - sum(chunks))):
        stop = start + size
        outputs.append(model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache,
                             position_ids=positions[:, start:stop], **kwargs))  # fmt: skip
        start = stop
    return outputs


# A cache sees of a shape its heads: with every cache where these differ, else with each cache in turn.
HEADS = ("llama-like", "odd heads", "multi-query, qk norm")
PAIRS = [(name, kind) for at, name in enumerate(SHAPES) for kind in (CACHES if name in HEADS else [CACHES[at % 3]])]


@pytest.mark.parametrize(("name", "kind"), grid(PAIRS, quick=PAIRS[::3]))
def test_cached_decoding_equals_the_full_forward(name: str, kind: str) -> None:
    model = make_model(**SHAPES[name])
    tokens, mask = left_padded(make_tokens(3, LENGTH), PADS)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits
    for chunks in ((), (5,)):
        outputs = step_by_step(model, tokens, mask, make_cache(kind, model), chunks)
        actual = torch.cat([each.logits for each in outputs], 1)
        assert relative_error(actual[mask == 1], expected[mask == 1]) < 1e-5


@pytest.mark.parametrize("name", ["llama-like", "learned positions"])
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, tokens = make_model(**SHAPES[name]), make_tokens(3, 12)
    padded, mask = left_padded(tokens, PADS)
    together = model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, pads in enumerate(PADS):
        alone = model.generate(tokens[row : row + 1, pads:], max_new_tokens=10, do_sample=False)
        assert torch.equal(together[row, 12:], alone[0, 12 - pads :])


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_generation_is_the_same_with_every_cache(way: str) -> None:
    model = make_model()
    tokens, mask = left_padded(make_tokens(3, 8), PADS)

    def generate(**kwargs: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(tokens, attention_mask=mask, max_new_tokens=12, **WAYS[way], **kwargs)

    expected = generate(use_cache=False)
    assert expected.shape[1] == 20
    assert torch.equal(generate(), expected)
    assert torch.equal(generate(cache_implementation="static"), expected)
    assert torch.equal(generate(past_key_values=RecursiveCache(model.config, reserve=4)), expected)


def test_generation_in_bf16() -> None:
    model = make_model().to(torch.bfloat16)
    tokens, mask = left_padded(make_tokens(3, LENGTH), PADS)
    generated = model.generate(tokens[:, :8], attention_mask=mask[:, :8], max_new_tokens=8, do_sample=False)
    assert generated.shape == (3, 16)
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, position_ids=positions_of(mask)).logits
    steps = torch.cat([each.logits for each in step_by_step(model, tokens, mask, make_cache("dynamic", model))], 1)
    assert full.dtype == torch.bfloat16
    # bf16 has 8 bits: each of the 18 layer applications rounds at 2^-9.
    assert relative_error(steps[mask == 1].float(), full[mask == 1].float()) < 0.05
    halted = model.generate(tokens[:, :8], attention_mask=mask[:, :8], max_new_tokens=8, exit="halting")
    assert halted.shape == (3, 16)


@pytest.mark.parametrize("kind", [None, *CACHES])
def test_nothing_before_a_changed_token_moves(kind: str | None) -> None:
    model, tokens = make_model(), make_tokens(2, 16)
    mask = torch.ones_like(tokens)

    def observe(tokens: Tensor) -> Tensor:
        if kind is None:
            with torch.no_grad():
                outputs = [model(tokens, output_blocks=True)]
        else:
            outputs = step_by_step(model, tokens, mask, make_cache(kind, model), output_blocks=True)
        said = torch.cat([torch.cat([each.block_logits, each.block_halting[..., None]], -1) for each in outputs], 2)
        return said.permute(1, 2, 0, 3).flatten(2)  # [B, S, blocks * (V + 1)]

    before = observe(tokens)
    for token in (1, 6, 7, 8, 12, 15):
        changed = tokens.clone()
        changed[:, token] = (changed[:, token] + 17) % VOCAB
        moved = (observe(changed) - before).abs()
        assert not moved[:, :token].any(), token
        assert (moved[:, token:] > 0).any(-1).all(), token


def test_a_cache_grows_a_block_at_a_time() -> None:
    """What it takes meanwhile is what it holds then, and one block; blocks that nobody reaches do not grow."""
    model, space = make_model(blocks=12, latents=1), 64
    cache, layers = RecursiveCache(model.config, reserve=space), model.config.num_hidden_layers

    def feed(tokens: int, layers: int) -> None:
        for layer in range(layers):
            cache.update(torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 8), layer)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        feed(space, layers)
        feed(1, layers)
    assert profiler.profiler is not None
    sizes = [each.nbytes() for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    held, block = sum(each.nbytes for each in cache.blocks), 4 * 2 * 2 * 8 * space * 4
    assert held == 12 * block * 3 // 2 and held + block <= max(itertools.accumulate(sizes)) < held + 2 * block
    for _ in range(40):
        feed(1, layers // 12)  # an exit after the first block
    assert [each.shape[-2] for each in cache.blocks] == [144, *[96] * 11] and cache.get_seq_length() == 105
    feed(1, layers)
    assert [each.shape[-2] for each in cache.blocks] == [144] * 12


def test_a_cache_can_be_cropped_repeated_and_selected() -> None:
    model, tokens = make_model(), make_tokens(2, 12)
    with torch.no_grad():
        expected = model(tokens).logits
        cache = RecursiveCache(model.config, reserve=4)
        model(tokens[:, :10], past_key_values=cache)
        cache.crop(-3)
        with pytest.raises(ValueError, match="crop.2. removes nothing; give a negative number"):
            cache.crop(2)
        assert cache.get_seq_length() == 7 and cache.batch_size == 2 and cache.is_initialized
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.reorder_cache(torch.tensor([1, 0]))
        again = model(tokens.flip(0)[:, 7:], past_key_values=cache).logits.flip(0)
        assert relative_error(again, expected[:, 7:]) < 1e-5
        cache.reset()
        assert len(cache) == 0 and cache.get_seq_length() == 0
        assert relative_error(model(tokens, past_key_values=cache).logits, expected) < 1e-5


def _said_with(model: Any, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at once, logits over a cache filled in three pieces, and generated tokens."""
    with torch.no_grad():
        cache, parts = None, []
        for start, end in ((0, 9), (9, 10), (10, tokens.shape[1])):
            said = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = said.past_key_values
            parts.append(said.logits)
        generated = model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
        return model(tokens, attention_mask=mask).logits, torch.cat(parts, 1), generated


@pytest.mark.grid
def test_every_attention_implementation_says_the_same() -> None:
    tokens, mask = left_padded(make_tokens(2, 14), [0, 3])
    model, seen = make_model(**SHAPES["odd heads"]), mask.bool()
    model.set_attn_implementation("eager")
    expected, _, generated = _said_with(model, tokens, mask)
    # Without compiling flex_attention: torch 2.14 writes C++ that does not compile for lengths that change on CPUs.
    with torch.compiler.set_stance("force_eager"):
        for name in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(name)
            full, cached, tokens_of = _said_with(model, tokens, mask)
            assert relative_error(full[seen], expected[seen]) < 5e-6, name
            assert relative_error(cached[seen], expected[seen]) < 5e-6, name
            assert torch.equal(tokens_of, generated), name
