"""HRM-Text in and out, judged by transformers' own class: its files, its logits, and its gradients in training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_recursive.hf.convert.hrm_text import expresses
from megatron_recursive.plan import RecursionConfig
from tests.distributed import run_distributed
from tests.unit_tests.hf.test_convert import _export, _import, _loaded_logits

VOCAB = 251  # is padded in Megatron


def make(**changes: Any) -> Any:
    """Transformers' model with random weights, in odd shapes: heads wider than the hidden size has them."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 500.0}
    shape = {"vocab_size": VOCAB, "hidden_size": 60, "num_attention_heads": 6, "head_dim": 14, "intermediate_size": 100,
             "num_hidden_layers": 2, "max_position_embeddings": 64, "rope_parameters": rope, "initializer_range": 0.1,
             "H_cycles": 2, "L_cycles": 3, "L_bp_cycles": [2], "embedding_scale": 7.0}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.HrmTextConfig(**{**shape, **changes})).float()
    with torch.no_grad():
        model.model.z_L_init.normal_()
    return model.eval()


def tokens(vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (2, 24), generator=torch.Generator().manual_seed(3))


def _their_gradients(folder: Path) -> dict[str, Tensor]:
    """Of the loss of the next token, under the names of the files. No row of the vocabulary is padding."""
    model = make(vocab_size=128).train()
    model.save_pretrained(folder)
    ids = tokens(128)
    F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name in [*found]:
        if name.endswith("self_attn.gate_proj.weight"):
            at = name.removesuffix("self_attn.gate_proj.weight")
            found[f"{at}attn.gqkv_proj.weight"] = torch.cat([
                found.pop(f"{at}self_attn.{each}_proj.weight") for each in ("gate", "q", "k", "v")
            ])  # fmt: skip
            found[f"{at}attn.o_proj.weight"] = found.pop(f"{at}self_attn.o_proj.weight")
            found[f"{at}mlp.gate_up_proj.weight"] = torch.cat([
                found.pop(f"{at}mlp.{each}_proj.weight") for each in ("gate", "up")
            ])  # fmt: skip
    return found


def _our_gradients(folder: Path) -> dict[str, Tensor]:
    from megatron_recursive.hf.convert import proof
    from megatron_recursive.hf.convert.donor_import import checkpoint_fetch
    from megatron_recursive.hf.convert.export import open_checkpoint

    _import(folder, folder / "ckpt")
    opened, ids, found = open_checkpoint(str(folder / "ckpt")), tokens(128), {}
    fetch = checkpoint_fetch(opened.checkpoint)
    with proof.one_process():
        model = proof.build_megatron(opened.arch, opened.recursion, torch.float32).train()
        with torch.no_grad():
            for name, weight in [*model.named_parameters(), ("initial_latent", model.initial_latent)]:
                weight.copy_(fetch(proof.checkpoint_key(name)))
        positions = torch.arange(ids.shape[1] - 1).expand(2, -1)
        model(ids[:, :-1], positions, None, labels=ids[:, 1:].contiguous()).objective_BS.mean().backward()
        gradients = {proof.checkpoint_key(name): p.grad for name, p in model.named_parameters()}
    assert {key for key, grad in gradients.items() if grad is None} == {key for key in gradients if "norm" in key}
    for item in opened.items():
        if item.name in gradients and gradients[item.name] is not None:
            found.update(zip(item.hf, item.transform.split(gradients[item.name], opened.arch), strict=True))
    return found


def _refused(folder: Path, name: str, options: dict[str, Any], **changes: Any) -> str:
    from megatron_recursive.errors import UserError

    config = json.loads((folder / "config.json").read_text())
    place = folder.parent / name
    place.mkdir()
    (place / "config.json").write_text(json.dumps({**config, **changes}))
    (place / "model.safetensors").symlink_to(folder / "model.safetensors")
    try:
        _import(place, folder.parent / "none", **options)
    except UserError as error:
        return str(error)
    return "nothing"


def _through(folder: Path) -> dict[str, Any]:
    import transformers

    from megatron_recursive.hf.convert.donor_import import ImportOptions, _recursion, import_model
    from megatron_recursive.hf.convert.sources import open_source
    from megatron_recursive.hf.convert.stacks import StackChoice
    from megatron_recursive.hf.convert.verify import agree, verify
    from megatron_recursive.inference.megatron_model import open_megatron

    model, said = make(), list[str]()
    model.save_pretrained(folder / "hf")
    imported = import_model(str(folder / "hf"), str(folder / "ckpt"), ImportOptions(), said.append).summary()
    exported = _export(folder / "ckpt", folder / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder / "back").eval()
    with torch.no_grad():
        logits = model(tokens()).logits, back(tokens()).logits
    theirs = _their_gradients(folder / "gradients")
    prompt = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with open_megatron(str(folder / "ckpt")) as (megatron, _):
        generated = megatron.generate(tokens()[:1, :8], max_new_tokens=6, do_sample=False).tolist()
    config = json.loads((folder / "hf" / "config.json").read_text())
    del config["num_layers_per_stack"]  # as its authors' own config says it
    (folder / "authors").mkdir()
    (folder / "authors" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    (folder / "authors" / "model.safetensors").symlink_to(folder / "hf" / "model.safetensors")
    return {
        "errors": (imported["max_logit_error"], exported["max_logit_error"]),
        "families": (imported["family"], exported["family"]), "type": type(back).__name__, "said": "\n".join(said),
        "same": agree(verify(str(folder / "hf"), str(folder / "back"), say=said.append)), "logits": logits,
        "config": back.config.to_dict(), "generated": (generated, back.generate(tokens()[:1, :8], **prompt).tolist()),
        "archs": (open_source(str(folder / "hf")).arch, open_source(str(folder / "authors")).arch),
        "refused": [
            _refused(folder / "hf", "window", {}, L_bp_cycles=[1, 0]),
            _refused(folder / "hf", "layers", {"layers": "0,1"}),
            _refused(folder / "hf", "family", {"recursion": {"recursion_family": "looped"}}),
            _refused(folder / "hf", "cycles", {}, H_cycles=0),
            _refused(folder / "hf", "stacks", {"stacks": StackChoice(core="0-3")}),
            _refused(folder / "hf", "tied", {}, tie_word_embeddings=True),
        ],
        "cut": _recursion(open_source(str(folder / "hf")), {"num_refinement_blocks": 1}, 4).latent_windows,
        "gradients": (theirs, _our_gradients(folder / "gradients")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(_through, 1, tmp_path_factory.mktemp("hrm"), timeout=240)[0]


def test_there_and_back_it_is_transformers_model(found: dict[str, Any]) -> None:
    assert max(found["errors"]) < 2e-6 and found["same"]
    assert found["families"] == ("hrm_text", "hrm_text") and found["type"] == "HrmTextForCausalLM"
    assert torch.equal(*found["logits"])
    ours, theirs = found["generated"]
    assert ours == theirs and len(ours[0]) == 14
    config = found["config"]
    assert (config["num_layers_per_stack"], config["num_hidden_layers"], config["L_bp_cycles"]) == (2, 16, [1, 2])
    assert config["embedding_scale"] == 7.0 and not config["prefix_lm"]
    assert "WARNING: its prefix_lm" in found["said"] and "layers low 0-1, high 2-3" in found["said"]


def test_layers_are_counted_by_stack_in_both_configs(found: dict[str, Any]) -> None:
    saved, authors = found["archs"]
    assert saved == authors and saved.num_layers == 4


def test_fewer_blocks_keep_the_windows_of_the_last(found: dict[str, Any]) -> None:
    assert found["cut"] == (2,)


def test_the_gradient_has_its_window(found: dict[str, Any]) -> None:
    theirs, ours = found["gradients"]
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert float((ours[name] - expected).abs().max() / expected.abs().max()) < 2e-5, name


def test_what_it_cannot_be_is_refused(found: dict[str, Any]) -> None:
    window, layers, family, cycles, stacks, tied = found["refused"]
    assert "leave --core out" in stacks and "has tie_word_embeddings" in tied
    assert "L_bp_cycles [1, 0]" in window and "leave --layers" in layers and "H_cycles 0" in cycles
    assert "hierarchical in itself, with --recursion-family hierarchical; leave that flag out" in family


def test_a_gate_is_none_of_its_words() -> None:
    own = RecursionConfig(recursion_family="hierarchical", state_init="trunc-normal", halt_loss_weight=0.0)
    assert expresses(own) and not expresses(dataclasses.replace(own, boundary="gate"))


@pytest.mark.grid
def test_tensor_parallel_ranks_give_its_logits(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "hf")
    run_distributed(_import, 1, tmp_path / "hf", tmp_path / "ckpt", timeout=200)
    with torch.no_grad():
        expected = model(tokens()).logits
    for logits in run_distributed(_loaded_logits, 2, tmp_path / "ckpt", 2, 1, timeout=200):
        assert float((logits - expected).abs().max() / expected.abs().max()) < 5e-6
