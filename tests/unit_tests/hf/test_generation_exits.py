"""Leaving early: the same depths and numbers in a forward, in a prompt and token by token; and what that saves."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GenerationConfig

from megatron_recursive.commands import shared
from megatron_recursive.hf.model import exits_recursive_gpt
from megatron_recursive.hf.model.cache_recursive_gpt import RecursiveCache
from megatron_recursive.hf.model.layers_recursive_gpt import rotate
from tests.grids import grid
from tests.unit_tests.hf.recursive_models import SHAPES, VOCAB, left_padded, make_config, make_model, make_tokens
from tests.unit_tests.hf.test_generation import CACHES, LENGTH, PADS, make_cache, positions_of, step_by_step
from tests.unit_tests.models.comparing import relative_error

THRESHOLD = 0.6
# Thresholds at which the tokens of these models leave at different depths.
EXITS: dict[str, dict[str, Any]] = {
    "halting": {"exit": "halting", "halt_threshold": THRESHOLD},
    "output-change": {"exit": "output-change", "exit_threshold": 0.2},
    "kl": {"exit": "kl", "exit_threshold": 0.015},
    "argmax": {"exit": "argmax", "exit_stable_blocks": 2},
    "beyond T": {"exit": "halting", "halt_threshold": THRESHOLD, "max_inference_refinement_steps": 6},
    "capped": {"exit": "halting", "halt_threshold": THRESHOLD, "max_inference_refinement_steps": 2},
}


def one_forward(model: Any, tokens: Tensor, mask: Tensor, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=positions_of(mask), use_cache=False, **kwargs)


def make_deep(**shape: Any) -> Any:
    return make_model(blocks=4, latents=1, **shape)


# --- the same everywhere --------------------------------------------------------------------------------------------


# Tokens that leave at different depths meet every cache; below and beyond the trained blocks alike.
PAIRS = [(name, kind) for at, name in enumerate(EXITS)
         for kind in (CACHES if name in ("halting", "beyond T") else [CACHES[at % 3]])]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), grid(PAIRS, quick=PAIRS[::2]))
def test_decoding_with_a_cache_equals_the_full_forward_without(name: str, kind: str) -> None:
    model = make_deep()
    tokens, mask = left_padded(make_tokens(3, LENGTH), PADS)
    expected = one_forward(model, tokens, mask, **EXITS[name])
    assert len(expected.blocks[mask == 1].unique()) > 1 and not expected.blocks[mask == 0].any()
    for chunks in ((), (5,)):
        outputs = step_by_step(model, tokens, mask, make_cache(kind, model), chunks, **EXITS[name])
        assert torch.equal(torch.cat([each.blocks for each in outputs], 1), expected.blocks)
        logits = torch.cat([each.logits for each in outputs], 1)
        assert relative_error(logits[mask == 1], expected.logits[mask == 1]) < 1e-5


@pytest.mark.parametrize("shape", grid(SHAPES, quick=["learned positions", "olmo2-like"]))
def test_every_kind_of_layer_can_leave_early(shape: str) -> None:
    model = make_deep(**SHAPES[shape])
    tokens, mask = left_padded(make_tokens(3, LENGTH), PADS)
    options = {"exit": "halting", "halt_threshold": 0.5}
    expected = one_forward(model, tokens, mask, **options)
    assert len(expected.blocks[mask == 1].unique()) > 1
    outputs = step_by_step(model, tokens, mask, make_cache("recursive", model), **options)
    assert torch.equal(torch.cat([each.blocks for each in outputs], 1), expected.blocks)
    logits = torch.cat([each.logits for each in outputs], 1)
    assert relative_error(logits[mask == 1], expected.logits[mask == 1]) < 1e-5


@pytest.mark.parametrize("state_norm", ["final", "none"])
def test_the_policy_against_a_reference_that_computes_everything(state_norm: str) -> None:
    """All blocks for all tokens, states held and keys and values swapped by hand as the policy says."""
    model = make_deep(config=make_config(4, 1, {"state_norm": state_norm}))
    tokens = make_tokens(2, 24)
    output = one_forward(model, tokens, torch.ones_like(tokens), exit="halting", halt_threshold=THRESHOLD)
    assert len(output.blocks.unique()) > 2
    base, left = model.model, output.blocks
    kept: dict[tuple[int, int], Tensor] = {}  # (place in the block, layer) -> keys and values of the block before

    def attention(layer: int, place: int, block: int, x: Tensor) -> Tensor:
        module = base.layers[layer].self_attn
        q, k, v = (proj(x).view(2, 24, -1, 8).transpose(1, 2) for proj in (module.q_proj, module.k_proj, module.v_proj))
        cos, sin = (each.unsqueeze(1) for each in base.rotary_emb(x, torch.arange(24)[None]))
        now = torch.stack([rotate(k, cos, sin), v])
        if block > 0:
            gone = (left <= block)[None, :, None, :, None]
            now = torch.where(gone, kept[place, layer], now)
        kept[place, layer] = now
        k, v = (each.repeat_interleave(2, 1) for each in now)
        out = torch.nn.functional.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return module.o_proj(out.transpose(1, 2).reshape(2, 24, -1))

    with torch.no_grad():
        embedding = base.embed_tokens(tokens) * base.embedding_multiplier
        states = base.initial_states(embedding, torch.arange(24)[None])
        for block in range(4):
            for place, target in enumerate(("latent", "output")):
                x = states["output"] + states["latent"] + (states["input"] if target == "latent" else 0)
                for number, layer in enumerate(base.layers):
                    x = x + attention(number, place, block, layer.input_layernorm(x))
                    x = x + layer.mlp(layer.pre_feedforward_layernorm(x))
                x = base.norm(x) if state_norm == "final" else x
                states[target] = torch.where((left > block)[..., None], x, states[target])
            asked = torch.sigmoid(model.halting_logits(base.read_state(states["output"]))) >= THRESHOLD
            here = left > block
            assert torch.equal(asked[here], (left == block + 1)[here]) or block == 3
        assert relative_error(output.logits, model.lm_head(base.read_state(states["output"]))) < 1e-5


@pytest.mark.parametrize("name", grid(EXITS, quick=["halting", "beyond T"]))
def test_nothing_before_a_changed_token_moves(name: str) -> None:
    model, tokens = make_deep(), make_tokens(2, 16)
    mask = torch.ones_like(tokens)

    def observe(tokens: Tensor, cached: bool) -> Tensor:
        if cached:
            outputs = step_by_step(model, tokens, mask, make_cache("recursive", model), **EXITS[name])
        else:
            outputs = [one_forward(model, tokens, mask, **EXITS[name])]
        return torch.cat([torch.cat([each.logits, each.blocks[..., None]], -1) for each in outputs], 1)

    for cached in (False, True):
        before = observe(tokens, cached)
        for token in (1, 7, 8, 15):
            changed = tokens.clone()
            changed[:, token] = (changed[:, token] + 17) % VOCAB
            moved = (observe(changed, cached) - before).abs()
            # Another number of tokens in a matrix product may round differently in the last bit.
            assert moved[:, :token].max() < 1e-5 * before.abs().max(), token
            assert (moved[:, token] > 0).any(-1).all(), token


def test_an_exit_that_nobody_takes_is_the_fixed_depth() -> None:
    model = make_deep()
    tokens, mask = left_padded(make_tokens(3, 20), PADS)
    output = one_forward(model, tokens, mask, exit="halting", halt_threshold=0.999)
    assert torch.equal(output.blocks, 4 * mask)
    fixed = one_forward(model, tokens, mask)
    assert relative_error(output.logits[mask == 1], fixed.logits[mask == 1]) < 1e-6


def test_an_exit_that_all_take_is_the_model_of_that_depth() -> None:
    model = make_deep()
    tokens, mask = left_padded(make_tokens(3, 20), PADS)
    for blocks in (1, 2, 3):
        output = one_forward(model, tokens, mask, exit="halting", halt_threshold=0.999,
                             max_inference_refinement_steps=blocks)  # fmt: skip
        model.set_num_refinement_blocks(blocks)
        shallow = one_forward(model, tokens, mask)
        model.set_num_refinement_blocks(4)
        assert relative_error(output.logits[mask == 1], shallow.logits[mask == 1]) < 1e-6


def test_fixed_and_adaptive_depth_may_share_a_cache() -> None:
    """A cached token that did not reach a block owes it what the policy says, whoever asks."""
    model, tokens = make_deep(), make_tokens(1, 12)
    runs = []
    for split in (1, 5):  # the same tokens, fed one by one or together
        cache = RecursiveCache(model.config)
        with torch.no_grad():
            model(tokens[:, :4], past_key_values=cache)
            for start in range(4, 9, split):
                model(tokens[:, start : start + split], past_key_values=cache, exit="halting")
            runs.append(model(tokens[:, 9:], past_key_values=cache).logits)
    assert relative_error(runs[0], runs[1]) < 1e-5


# --- generate() -----------------------------------------------------------------------------------------------------


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False}, "sampling": {"do_sample": True}, "beams": {"do_sample": False, "num_beams": 3},
}  # fmt: skip
NAMED = [(name, way) for at, name in enumerate(EXITS) for way in (WAYS if at == 0 else [list(WAYS)[at % 3]])]


@pytest.mark.parametrize(("name", "how"), grid(NAMED, quick=NAMED[::3]))
def test_generation_is_the_same_with_every_cache(name: str, how: str) -> None:
    model, way = make_deep(), WAYS[how]
    tokens, mask = left_padded(make_tokens(3, 8), PADS)

    def generate(**kwargs: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(tokens, attention_mask=mask, max_new_tokens=12, **way, **EXITS[name], **kwargs)

    expected = generate(use_cache=False)
    assert torch.equal(generate(), expected)
    report = model.last_exit_report
    assert report.decoded_tokens == 11 * 3 * way.get("num_beams", 1)
    assert sum(report.histogram.values()) == report.tokens
    assert torch.equal(generate(cache_implementation="static"), expected)
    assert model.last_exit_report.histogram == report.histogram


def test_the_generation_config_carries_an_exit() -> None:
    model, tokens = make_deep(), make_tokens(2, 6)
    expected = model.generate(tokens, max_new_tokens=8, do_sample=False, exit="halting", halt_threshold=THRESHOLD)
    histogram = model.last_exit_report.histogram
    config = GenerationConfig(max_new_tokens=8, do_sample=False, exit="halting", halt_threshold=THRESHOLD)
    assert torch.equal(model.generate(tokens, generation_config=config), expected)
    assert model.last_exit_report.histogram == histogram
    model.generation_config.exit, model.generation_config.halt_threshold = "halting", 0.6
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), expected)
    assert model.last_exit_report.histogram == histogram
    model.generate(tokens, max_new_tokens=8, do_sample=False, exit="none")
    assert model.last_exit_report is None


def test_a_threshold_of_another_exit_is_not_taken() -> None:
    model, tokens, settings = make_deep(), make_tokens(2, 6), {"max_new_tokens": 4, "do_sample": False}

    def taken(**options: Any) -> dict[int, int]:
        model.generate(tokens, **settings, **options)
        return model.last_exit_report.histogram

    expected = [taken(exit="kl", exit_threshold=0.015), taken(exit="kl")]
    model.generation_config.exit, model.generation_config.exit_threshold = "output-change", 5.0
    config = GenerationConfig(**settings, exit="kl", exit_threshold=0.015)
    assert [taken(exit="kl", exit_threshold=0.015), taken(exit="kl")] == expected
    model.generate(tokens, generation_config=config)
    assert model.last_exit_report.histogram == expected[0]
    del config.exit_threshold
    model.generate(tokens, generation_config=config)
    assert model.last_exit_report.histogram == expected[1]
    assert taken() == {2: 18}  # which everyone's change is below


# --- what it saves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXITS)
def test_only_tokens_that_are_still_there_are_computed(name: str) -> None:
    model, computed = make_deep(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[:-1].numel()))
    tokens = make_tokens(8, 24)
    mask = torch.ones_like(tokens)
    for cache in (None, make_cache("recursive", model), make_cache("static", model)):
        computed.clear()
        if cache is None:
            blocks = one_forward(model, tokens, mask, **EXITS[name]).blocks
        else:
            outputs = step_by_step(model, tokens, mask, cache, **EXITS[name])
            blocks = torch.cat([each.blocks for each in outputs], 1)
        assert sum(computed) == 2 * int(blocks.sum())  # two passes a block


PROMPTS = {"one token": (make_tokens(1, 1), None), "a padded batch": left_padded(make_tokens(3, 12), PADS)}


ADAPTERS = {"rank": 3, "alpha": 6, "targets": ["linear_qkv", "linear_fc2"]}
KINDS: dict[str, dict[str, Any]] = {  # the cut leaves adapters to the last block's passes
    "plain": {}, "gated": {"attention_gate": True, "num_attention_heads": 6, "head_dim": 10},
    "per pass": {"pass_adapters": ADAPTERS, "recursion": {"detach_between_refinements": True}},
}  # fmt: skip


@functools.cache
def counted_flops(kind: str, prompt: str, **kwargs: Any) -> tuple[float, Any]:
    """Of one generation, with attention that computes every score; and the report."""
    config, (tokens, mask) = make_config(4, 1, **KINDS[kind], attn_implementation="eager"), PROMPTS[prompt]
    model = make_deep(config=config)
    with FlopCounterMode(display=False) as counter:
        model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **kwargs)
    return counter.get_total_flops(), model.last_exit_report


CASES = [("plain", "beyond T", "a padded batch", None), ("gated", "halting", "a padded batch", None),
         ("per pass", "beyond T", "a padded batch", None), ("plain", "halting", "one token", "static"),
         ("plain", "kl", "a padded batch", "dynamic"), ("plain", "argmax", "one token", None),
         ("plain", "capped", "a padded batch", "static")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "prompt", "cache"), grid(CASES, quick=CASES[:3]))
def test_the_report_counts_the_flops_that_were_done(kind: str, name: str, prompt: str, cache: str | None) -> None:
    """Prompts included, also what was computed for padding and for tokens that had left."""
    counted, report = counted_flops(kind, prompt, cache_implementation=cache, **EXITS[name])
    assert report.flops == pytest.approx(counted, rel=1e-6)
    fixed, _ = counted_flops(kind, prompt, cache_implementation=cache)
    assert report.fixed_depth_flops == pytest.approx(fixed, rel=1e-6)
    assert report.flops < report.fixed_depth_flops or report.mean_blocks > 3
    assert report.to_dict()["mean_decoded_blocks"] == report.mean_decoded_blocks > 1
    fed = PADS if prompt == "a padded batch" else [0]
    assert report.tokens == sum(PROMPTS[prompt][0].shape[1] - pads + 5 for pads in fed)


def test_the_loss_under_an_exit_is_that_of_the_answers() -> None:
    model, tokens = make_deep(), make_tokens(2, 10)
    with torch.no_grad():
        output = model(tokens, labels=tokens, exit="halting", output_blocks=True)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.halt_loss is None
    # A token that has left goes on saying what it said.
    at_exit = output.block_logits.gather(0, (output.blocks - 1)[None, ..., None].expand(-1, -1, -1, VOCAB))[0]
    torch.testing.assert_close(at_exit, output.logits)
    torch.testing.assert_close(output.block_logits[-1], output.logits)


def test_the_commands_offer_every_exit() -> None:
    assert shared.EXITS == exits_recursive_gpt.EXITS


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_the_cap() -> None:
    model, tokens = make_model(blocks=3, latents=1), make_tokens(1, 4)
    never = {"exit": "halting", "halt_threshold": 0.999}
    with torch.no_grad():
        assert model.config.recursion["max_inference_refinement_steps"] == 12
        assert model(tokens, **never).blocks.max() == 3  # not given: never beyond the trained blocks
        assert model(tokens, **never, max_inference_refinement_steps=2).blocks.max() == 2
        assert model(tokens, **never, max_inference_refinement_steps=5).blocks.max() == 5
        model.config.recursion["max_inference_refinement_steps"] = 2
        assert model(tokens, **never).blocks.max() == 2
        for depth in (3, 4, 14):  # asked for
            model.generate(tokens, max_new_tokens=2, num_refinement_blocks=depth, **never)
            assert set(model.last_exit_report.histogram) == {depth}
        assert model(tokens, **never).blocks.max() == 2
        model.set_num_refinement_blocks(4)
        assert model(tokens, **never).blocks.max() == 4
        assert make_model(blocks=14, latents=1)(tokens, **never).blocks.max() == 14  # 12 is nobody's wish


def test_going_beyond_the_trained_blocks_warns(caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    transformers.utils.logging.enable_propagation()
    model = make_model(blocks=2, latents=1)
    with torch.no_grad():
        model(make_tokens(1, 4), exit="halting", max_inference_refinement_steps=2)
        assert not caplog.records
        model(make_tokens(1, 4), exit="halting", max_inference_refinement_steps=7)
    assert "7 is beyond the 2 blocks that the model was trained with" in caplog.text


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"exit": "entropy"}, "exit must be one of halting, quantile, output-change, kl, argmax, but is entropy."),
    ({}, {"exit": "halting", "halt_threshold": 1.0}, "halt_threshold must lie strictly between 0 and 1, but is 1.0."),
    ({}, {"exit": "kl", "exit_threshold": -1.0}, "exit_threshold must be at least 0, but is -1.0."),
    ({}, {"exit": "argmax", "exit_stable_blocks": 1}, "exit_stable_blocks must be at least 2, but is 1."),
    ({}, {"exit": "argmax", "halt_threshold": 0.9}, "exit=argmax does not read halt_threshold; give exit_stable_"),
    ({}, {"exit": "kl", "exit_stable_blocks": 9}, "exit=kl does not read exit_stable_blocks; give exit_threshold, or"),
    ({}, {"exit": "halting", "max_inference_refinement_steps": 0}, "must be at least 1, but is 0."),
    ({"recursion": {"halt_loss_weight": 0.0}}, {"exit": "halting"}, "needs a halting head"),
    ({"recursion": {"enable_recursive_refinement": False}}, {"exit": "kl"}, "needs a plan of refinement blocks"),
    ({"attn_implementation": "eager"}, {"exit": "halting", "output_attentions": True}, "do not go with an exit"),
]


@pytest.mark.parametrize(("config", "options", "sentence"), REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(
    config: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    model = make_model(config=make_config(**config))
    with pytest.raises(ValueError, match=sentence):
        model(make_tokens(1, 4), **options)
    if "output_attentions" not in options:
        with pytest.raises(ValueError, match=sentence):
            model.generate(make_tokens(1, 4), max_new_tokens=2, **options)


def test_hidden_states_of_the_config_are_refused_too() -> None:
    model = make_deep()
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="do not go with an exit"):
        model(make_tokens(1, 4), exit="halting")


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"exit": "halting", "halt_threshold": 0.999}])
def test_a_cache_of_a_smaller_depth_is_refused(options: dict[str, Any]) -> None:
    model, tokens = make_deep(), make_tokens(1, 8)
    for cache in (DynamicCache(config=model.config), DynamicCache(), RecursiveCache(model.config)):
        model.generate(tokens, past_key_values=cache, max_new_tokens=3, num_refinement_blocks=2, do_sample=False)
        if isinstance(cache, RecursiveCache) or (options and len(cache.layers) < model.config.num_hidden_layers):
            model(tokens[:, :1], past_key_values=cache, **options)  # which take over what the blocks before have
            continue
        with pytest.raises(ValueError, match="filled at a smaller depth: 0 of its 10 tokens are in the last layer"):
            model(tokens[:, :1], past_key_values=cache, **options)


@torch.no_grad()
@pytest.mark.parametrize("depths", [(2, 4), (4, 2), (4, 4)])
def test_a_cache_of_another_depth_of_a_core_is_refused(depths: tuple[int, int]) -> None:
    recurrent = {"recursion_family": "recurrent", "num_recurrences": 4, "num_prelude_layers": 1, "num_coda_layers": 1}
    model, tokens, (filled, read) = make_model(recursion=recurrent, num_layers=3), make_tokens(1, 8), depths
    for kind in (DynamicCache, RecursiveCache):
        model.set_num_refinement_blocks(filled)
        cache = kind(config=model.config)
        model(tokens, past_key_values=cache)
        model.set_num_refinement_blocks(read)
        if filled == read:
            model(tokens[:, :1], past_key_values=cache)
            continue
        with pytest.raises(ValueError, match="filled at another depth; start with a new one"):
            model(tokens[:, :1], past_key_values=cache)


def test_training_with_an_exit_is_refused() -> None:
    with pytest.raises(ValueError, match="An exit is for inference"):
        make_deep().train()(make_tokens(1, 4), exit="halting")
