"""Families in Hugging Face: through Megatron and back with both proofs, cached generation, exits, another depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.unit_tests.hf.recursive_models import left_padded, make_config, make_model, make_tokens
from tests.unit_tests.hf.test_convert import _export, _import, _quiet

RECURRENT = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "recurrent": {**RECURRENT, "injection": "add"},
    "recurrent, mean": {**RECURRENT, "recurrence_step": "mean"},
    "huginn": {**RECURRENT, "injection": "concat", "state_init": "sampled", "state_norm": "core-end"},
    "parcae": {**RECURRENT, "injection": "diagonal", "state_init": "sampled", "recurrence_step": "0.6"},
    "norm in core": {**RECURRENT, "injection": "concat", "state_norm": "core"},
    "gate": {**RECURRENT, "recurrence_step": "mean", "boundary": "gate"},
    "gate, core": {"boundary": "gate", "num_refinement_blocks": 3, "num_latent_refinements": 2},
    "norm-inject": {**RECURRENT, "boundary": "norm-inject"},
    "looped": {"recursion_family": "looped", "num_refinement_blocks": 3},
    "looped, gated": {"recursion_family": "looped", "num_refinement_blocks": 4, "exit_gate": True},
    "hierarchical": {"recursion_family": "hierarchical", "num_refinement_blocks": 2, "num_latent_refinements": 2},
}


def family_model(name: str, **more: Any) -> Any:
    return make_model(config=make_config(recursion={**FAMILIES[name], **more}, num_layers=4))


def _there_and_back(name: str, folder: Path) -> tuple[float, float, bool, list[int], list[int]]:
    from megatron_recursive.hf.convert.verify import agree, verify
    from megatron_recursive.inference.megatron_model import open_megatron

    model = family_model(name)
    model.save_pretrained(folder / "hf")
    first, second = _import(folder / "hf", folder / "ckpt"), _export(folder / "ckpt", folder / "back")
    same = agree(verify(str(folder / "hf"), str(folder / "back"), say=_quiet))
    ids = make_tokens(1, 6)
    exits: dict[str, Any] = {"exit": "quantile", "exit_threshold": 0.6} if "exit_gate" in FAMILIES[name] else {}
    exits = {"exit": "halting"} if name == "gate, core" else exits
    with open_megatron(str(folder / "ckpt")) as (megatron, _):
        theirs = megatron.generate(ids, max_new_tokens=6, do_sample=False, **exits)
    mine = model.generate(ids, max_new_tokens=6, do_sample=False, **exits)
    if exits:
        assert megatron.last_exit_report.histogram == model.last_exit_report.histogram
        assert len(model.last_exit_report.histogram) > 1
    return first["max_logit_error"], second["max_logit_error"], same, theirs[0].tolist(), mine[0].tolist()


QUICK = ("gate, core", "huginn", "looped, gated")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.grid) for name in FAMILIES
                                            if name not in QUICK)])  # fmt: skip
def test_there_and_back_and_generation_from_both(name: str, tmp_path: Path) -> None:
    ((first, second, same, theirs, mine),) = run_distributed(_there_and_back, 1, name, tmp_path, timeout=240)
    assert first < 2e-6 and second < 2e-6 and same
    assert theirs == mine and len(mine) == 12


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_steps_give_the_logits_of_the_whole(name: str) -> None:
    model, ids = family_model(name), make_tokens(2, 9)
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    rest = [model(ids[:, i : i + 1], past_key_values=first.past_key_values, use_cache=True).logits for i in range(5, 9)]
    assert torch.allclose(torch.cat([first.logits, *rest], dim=1), whole, atol=1e-5)
    layers = first.past_key_values.layers
    assert len(layers) == model.config.num_hidden_layers and all(each.get_seq_length() == 9 for each in layers)
    moved = ids.clone()
    moved[:, -1] = (moved[:, -1] + 1) % 61
    assert torch.equal(model(moved).logits[:, :-1], whole[:, :-1])


def test_exits_leave_between_loops_and_not_within_a_core() -> None:
    looped, ids = family_model("looped"), make_tokens(1, 6)
    late = looped.generate(ids, max_new_tokens=4, do_sample=False, exit="halting", halt_threshold=0.999)
    assert torch.equal(late, looped.generate(ids, max_new_tokens=4, do_sample=False))
    looped.generate(ids, max_new_tokens=4, do_sample=False, exit="halting", halt_threshold=0.3)
    assert 1 <= looped.last_exit_report.mean_blocks < 3
    with pytest.raises(ValueError, match="needs a plan of refinement blocks"):
        family_model("recurrent")(ids, exit="argmax")


def test_a_quantile_is_where_the_gate_has_let_go_of_so_much() -> None:
    model, ids = family_model("looped, gated"), make_tokens(3, 9)
    whole = model(ids, output_blocks=True)
    leaving = torch.sigmoid(model.exit_gate(torch.stack(model.model(ids, output_block_states=True).block_states)))
    stays = (1 - leaving[:-1, ..., 0]).cumprod(0)
    cumulative = torch.cat([1 - stays, torch.ones_like(stays[:1])])
    assert torch.allclose(whole.block_halting, cumulative, atol=1e-6)
    taken = set()
    for quantile in (0.3, 0.6, 0.9):
        found = model(ids, exit="quantile", exit_threshold=quantile)
        # The first token sees none but itself, so that it leaves with what the whole depth says at that loop.
        expected = 1 + (cumulative[:, :, 0] < quantile).sum(0)
        assert torch.equal(found.blocks[:, 0], expected)
        there = whole.block_logits[expected - 1, torch.arange(3), 0]
        assert torch.allclose(found.logits[:, 0], there, atol=1e-5)
        taken |= {*found.blocks.flatten().tolist()}
    assert len(taken) >= 3
    assert torch.allclose(model(ids, exit="quantile", exit_threshold=1.0).logits, whole.logits, atol=1e-5)
    with pytest.raises(ValueError, match="needs an exit gate"):
        family_model("looped")(ids, exit="quantile")
    with pytest.raises(ValueError, match="at most 1"):
        model(ids, exit="quantile", exit_threshold=1.5)
    with torch.no_grad():
        model.exit_gate.bias.fill_(30.0)  # its probability rounds to 1
    assert (model(ids, exit="quantile", exit_threshold=0.999).blocks == 1).all()
    assert (model(ids, exit="quantile", exit_threshold=1.0).blocks == 4).all()
    model.set_num_refinement_blocks(1)
    assert torch.equal(model(ids, output_blocks=True).block_halting, torch.ones(1, *ids.shape))


def test_a_quantile_with_a_cache_is_that_of_the_prompt_at_once() -> None:
    model, ids = family_model("looped, gated"), make_tokens(2, 8)
    options = {"exit": "quantile", "exit_threshold": 0.6, "use_cache": True}
    whole, cached = model(ids, **options), model(ids[:, :4], **options)
    logits, blocks = [cached.logits], [cached.blocks]
    for i in range(4, 8):
        step = model(ids[:, i : i + 1], past_key_values=cached.past_key_values, **options)
        logits, blocks = [*logits, step.logits], [*blocks, step.blocks]
    assert torch.equal(torch.cat(blocks, 1), whole.blocks) and len({*whole.blocks.flatten().tolist()}) > 1
    assert torch.allclose(torch.cat(logits, 1), whole.logits, atol=1e-5)


def test_a_core_of_another_depth_is_that_of_the_knobs() -> None:
    for name in ("recurrent", "recurrent, mean", "huginn", "norm in core"):
        model, deep = family_model(name), family_model(name, num_recurrences=5)
        deep.load_state_dict(model.state_dict())
        model.set_num_refinement_blocks(5)
        ids = make_tokens(1, 6)
        assert torch.equal(model(ids).logits, deep(ids).logits)
        model.set_num_refinement_blocks(3)
        assert torch.equal(model(ids).logits, family_model(name)(ids).logits)


def test_padding_on_the_left_moves_no_sampled_start() -> None:
    model, ids = family_model("huginn"), make_tokens(2, 6)
    padded, mask = left_padded(torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1), [3, 3])
    alone, beside = model(ids).logits, model(padded, attention_mask=mask).logits[:, 3:]
    assert torch.allclose(alone, beside, atol=1e-5)
    moved = model(ids, position_ids=torch.arange(1, 7)[None]).logits
    assert (moved - alone).abs().max() > 1e-3  # it is a function of the position
    model.train()
    assert (model(ids).logits - model(ids).logits).abs().max() > 1e-3
