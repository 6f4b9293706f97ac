"""Adapters of a run leave as a PEFT folder, merged, or pass by pass in our own model, and compute what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.plan.lora import LoRA
from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.hf.donors import LAYERS, save_donor, tokens
from tests.unit_tests.training.runs import train

LORA = ["--lora-rank", "3", "--lora-alpha", "12", "--lr", "3e-2"]
RECURRENT = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 3,
             "backprop_depth": 2, "injection": "add"}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {  # donor, knobs, flags
    "plain": ("qwen2", {"enable_recursive_refinement": False}, []),
    "looped": ("llama3, head_dim", {"recursion_family": "looped", "num_refinement_blocks": 2}, []),
    "some": ("olmo2", {"enable_recursive_refinement": False}, ["--lora-targets", "linear_fc1", "linear_proj"]),
    "in 16 bit": ("qwen2", {"enable_recursive_refinement": False}, ["--bf16"]),
    "core, per pass": ("llama3, head_dim", {"num_refinement_blocks": 2, "num_latent_refinements": 1},
                       ["--lora-per-pass"]),
    "recurrent, per pass": ("qwen3", RECURRENT, ["--lora-per-pass", "--lora-targets", "linear_qkv", "linear_fc2"]),
}  # fmt: skip


def _import(donor: Path, out: Path, knobs: dict[str, Any]) -> None:
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model

    import_model(str(donor), str(out), ImportOptions(recursion=knobs), lambda _: None)


def trained(kind: str, folder: Path) -> Path:
    """Adapters after three steps at a high rate, in one process."""
    donor, knobs, flags = KINDS[kind]
    run_distributed(_import, 1, save_donor(donor, folder / "donor"), folder / "ckpt", knobs)
    mock = ("--mock-data --tokenizer-type NullTokenizer --eval-iters 0 --num-workers 0 --train-iters 3 "
            "--save-interval 3 --seq-length 32 --micro-batch-size 2 --finetune").split()  # fmt: skip
    places = ["--load", folder / "ckpt", "--save", folder / "run"]
    argv = [f"@{folder / 'ckpt/megatron_args.txt'}", *mock, *LORA, *flags, *places]
    assert train(*argv, flags=(), recursion=()) is None
    return folder / "run"


def exports(run: Path, modes: dict[str, str | None]) -> tuple[dict[str, Any], Tensor]:
    """The reports by mode, and the logits of Megatron's model with its adapters, on the test's tokens."""
    from megatron_recursive.hf.convert import proof
    from megatron_recursive.hf.convert.donor_import import checkpoint_fetch
    from megatron_recursive.hf.convert.export import export_model, open_checkpoint
    from megatron_recursive.hf.convert.unroll import unroll_model
    from megatron_recursive.inference.megatron_model import open_megatron

    reports: dict[str, Any] = {}
    for name, mode in modes.items():
        try:
            reports[name] = export_model(str(run), str(run.parent / name), say=lambda _: None, lora=mode).summary()
        except UserError as error:
            reports[name] = str(error)
    for model in (run, run.parent / "inside") if "inside" in modes else ():
        with pytest.raises(UserError, match="has an adapter for each pass"):
            unroll_model(str(model), str(run.parent / "unrolled"), say=lambda _: None)
    if "inside" in modes:
        with open_megatron(str(run)) as (megatron, _):
            has_one_depth(megatron)
    opened, ids = open_checkpoint(str(run)), tokens()
    text = proof.Text(ids, torch.arange(ids.shape[1]).expand_as(ids))
    fetch = checkpoint_fetch(opened.checkpoint)
    return reports, proof.megatron_logits(opened.arch, opened.recursion, fetch, text, torch.float32, opened.lora)


def has_one_depth(model: Any) -> None:
    """It takes the depth that its adapters are of, which stays as it is, and refuses others."""
    plan = model.config.recursion_plan
    model.set_num_refinement_blocks(plan.depth)
    assert model.config.recursion_plan == plan
    for other in (1, plan.depth + 1):
        with pytest.raises(ValueError, match="an adapter for each pass, and none for those of another depth"):
            model.set_num_refinement_blocks(other)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def error(found: Any, expected: Tensor) -> float:
    return float((found.logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.heavy) for kind in ("plain", "looped", "some")])
def test_a_peft_folder_over_the_base_computes_what_the_run_does(kind: str, tmp_path: Path) -> None:
    import peft  # which imports much, and minutes on a loaded machine

    run = trained(kind, tmp_path)
    ((_, expected),) = run_distributed(exports, 1, run, {"base": "base", "adapter": "peft"})
    with torch.no_grad():
        base = load(tmp_path / "base")
        assert error(base(tokens()), expected) > 1e-2
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert error(wrapped(input_ids=tokens()), expected) < 1e-5
        names = {name.rpartition(".lora_A")[0] for name, _ in wrapped.named_parameters() if "lora_A" in name}
        assert len(names) == (3 if kind == "some" else 7) * LAYERS
        assert error(wrapped.merge_and_unload()(tokens()), expected) < 1e-5


@pytest.mark.parametrize("kind", grid(["plain", "looped", "some"], quick=["looped"]))
def test_the_merged_model_computes_what_the_run_does(kind: str, tmp_path: Path) -> None:
    run = trained(kind, tmp_path)
    ((reports, expected),) = run_distributed(exports, 1, run, {"merged": None, "base": "base", "adapter": "peft"})
    with torch.no_grad():
        base, merged = load(tmp_path / "base"), load(tmp_path / "merged")
        assert error(merged(tokens()), expected) < 1e-5 > reports["merged"]["max_logit_error"]
        assert reports["adapter"]["tensors"] == 2 * (3 if kind == "some" else 7) * LAYERS
        factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        scale = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] / 3
        for name, down in factors.items():
            if place := name.removesuffix(".lora_A.weight") if ".lora_A." in name else "":
                weight = base.get_parameter(f"{place.removeprefix('base_model.model.')}.weight")
                weight += scale * factors[f"{place}.lora_B.weight"] @ down
        assert error(base(tokens()), expected) < 1e-5  # by hand what PEFT would do


@pytest.mark.parametrize("kind", grid(["core, per pass", "recurrent, per pass"], quick=["recurrent, per pass"]))
def test_adapters_of_each_pass_go_out_inside_our_own_model(kind: str, tmp_path: Path) -> None:
    run = trained(kind, tmp_path)
    modes = {"inside": None, "base": "base", "merged": "merged", "adapter": "peft"}
    ((reports, expected),) = run_distributed(exports, 1, run, modes)
    assert isinstance(reports["inside"], dict), reports["inside"]
    assert "does not go with adapters of each pass (--lora-per-pass), which one weight cannot hold" in reports["merged"]
    assert "which PEFT does not know; leave it out for a model of our own class" in reports["adapter"]
    assert not (tmp_path / "merged").exists() and not (tmp_path / "adapter").exists()
    model = load(tmp_path / "inside")
    with torch.no_grad():
        assert error(model(tokens()), expected) < 1e-5 > reports["inside"]["max_logit_error"]
        assert error(load(tmp_path / "base")(tokens()), expected) > 1e-2
        model.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again")
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
        cached = again.generate(tokens()[:1, :6], max_new_tokens=4, do_sample=False, use_cache=True)
        assert torch.equal(cached, again.generate(tokens()[:1, :6], max_new_tokens=4, do_sample=False, use_cache=False))
        if kind == "core, per pass":  # beyond the plan the last block's adapters, not the first's, which has none
            taken = []
            for layer in model.model.layers:
                layer.register_forward_pre_hook(lambda _, __, given: taken.append(given["adapter"]), with_kwargs=True)
            model(tokens(), exit="halting", halt_threshold=1 - 1e-12, max_inference_refinement_steps=3)
            deepest, more = model.model.plan.num_passes, model.model.plan.passes_per_block
            assert taken[-more * LAYERS :: LAYERS] == [*range(deepest - more, deepest)]
    passes = {name.rpartition("_")[2] for name, _ in model.named_parameters() if ".pass_A_" in name}
    assert len(passes) > 1 and again.config.pass_adapters["rank"] == 3
    has_one_depth(again)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    adapters = {name: weight.grad for name, weight in model.named_parameters() if ".pass_" in name}
    assert not [name for name, gradient in adapters.items() if gradient is None or not gradient.any()]


def test_keys_are_those_of_the_targets_alone() -> None:
    from megatron_recursive.plan import RecursionPlan

    lora, plain = LoRA(2, 4.0, ("linear_fc2",)), RecursionPlan.plain()
    place = "decoder.layers.1.lora.linear_fc2"
    assert lora.keys(plain, 2, 1, "mlp.linear_fc2.weight") == {"shared": (f"{place}.A_shared", f"{place}.B_shared")}
    assert not lora.keys(plain, 2, 1, "mlp.linear_fc1.weight") and not lora.keys(plain, 2, 1, "mlp.linear_fc2.bias")


def test_a_sum_of_16_bit_is_proven_before_it_is_rounded(tmp_path: Path) -> None:
    """Rounding it once moves the logits by 4e-3, which would hide an adapter that was put in wrongly."""
    reports, _ = run_distributed(exports, 1, trained("in 16 bit", tmp_path), {"merged": "merged"})[0]
    assert reports["merged"]["max_logit_error"] <= 1e-5
    written = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert written.dtype is torch.bfloat16
