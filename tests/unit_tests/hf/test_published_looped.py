"""Ouro and Nanbeige in, against their formula in plain torch, which reads the tensors by their published names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.export import MegatronModel
from megatron_recursive.hf.convert.published_looped import published_config
from megatron_recursive.hf.convert.sources import open_source
from megatron_recursive.inference.loading import open_model
from megatron_recursive.plan import RecursionConfig
from tests.distributed import run_distributed
from tests.unit_tests.hf.test_convert import _export, _import

VOCAB, LAYERS, WIDTH = 61, 3, 36
COMMON = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 50, "num_hidden_layers": LAYERS,
          "max_position_embeddings": 64, "initializer_range": 0.02, "hidden_act": "silu", "tie_word_embeddings": False,
          "attention_dropout": 0.0}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "ouro": {
        **COMMON, "architectures": ["OuroForCausalLM"], "model_type": "ouro", "num_attention_heads": 3,
        "num_key_value_heads": 3, "head_dim": 12, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None,
        "total_ut_steps": 4, "early_exit_threshold": 1.0, "bos_token_id": 0, "eos_token_id": 0,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
        "layer_types": ["full_attention"] * LAYERS, "auto_map": {"AutoConfig": "configuration_ouro.OuroConfig"},
    },
    "nanbeige": {  # heads are wider than the hidden size divided by their number
        **COMMON, "architectures": ["NanbeigeForCausalLM"], "model_type": "nanbeige", "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-5, "rope_theta": 7e7, "num_loops": 2,
        "rope_scaling": {"rope_type": "default", "rope_theta": 7e7}, "loop_loss_weights": [],
        "skip_loop_final_norm": False, "enable_double_loop_split": False, "enable_mhc": False,
        "enable_depth_attention": False, "emb_neighbor_num": None, "qk_layernorm": False, "pretraining_tp": 1,
    },
}  # fmt: skip


def tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        if len(shape) == 1:
            return 1 + 0.2 * torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator) * 1.5 * shape[-1] ** -0.5

    q, k = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    ffn = config["intermediate_size"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    found = {"model.embed_tokens.weight": normal(VOCAB, WIDTH), "model.norm.weight": normal(WIDTH),
             "lm_head.weight": normal(VOCAB, WIDTH)}  # fmt: skip
    if config["model_type"] == "ouro":
        norms += ["input_layernorm_2", "post_attention_layernorm_2"]
        found["model.early_exit_gate.weight"], found["model.early_exit_gate.bias"] = normal(1, WIDTH), normal(1) - 1
    for i in range(config["num_hidden_layers"]):
        sizes = {"self_attn.q_proj": (q, WIDTH), "self_attn.k_proj": (k, WIDTH), "self_attn.v_proj": (k, WIDTH),
                 "self_attn.o_proj": (WIDTH, q), "mlp.gate_proj": (ffn, WIDTH), "mlp.up_proj": (ffn, WIDTH),
                 "mlp.down_proj": (WIDTH, ffn), **{norm: (WIDTH,) for norm in norms}}  # fmt: skip
        found.update({f"model.layers.{i}.{name}.weight": normal(*shape) for name, shape in sizes.items()})
    return found


def save(kind: str, folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = {**CONFIGS[kind], **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors(config), folder / "model.safetensors")
    return folder


def loops(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> list[Tensor]:
    """The state after every loop, [B, S, H], as the two models are described."""
    d, heads, groups = (config[name] for name in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    angle = torch.arange(ids.shape[1])[:, None] * config["rope_theta"] ** -(torch.arange(0, d, 2) / d)
    cos, sin = (torch.cat([each, each], -1) for each in (angle.cos(), angle.sin()))

    def norm(x: Tensor, name: str) -> Tensor:
        return w[name] * x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()

    def split(x: Tensor, name: str) -> Tensor:
        return (x @ w[name].T).unflatten(-1, (-1, d)).transpose(1, 2)

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

    def layer(x: Tensor, at: str) -> Tensor:
        ouro = config["model_type"] == "ouro"
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (split(y, f"{at}self_attn.{each}_proj.weight") for each in "qkv")
        k, v = (each.repeat_interleave(heads // groups, 1) for each in (turn(k), v))
        y = F.scaled_dot_product_attention(turn(q), k, v, is_causal=True).transpose(1, 2).flatten(2)
        y = y @ w[at + "self_attn.o_proj.weight"].T
        x = x + (norm(y, at + "input_layernorm_2.weight") if ouro else y)
        y = norm(x, at + "post_attention_layernorm.weight")
        y = F.silu(y @ w[at + "mlp.gate_proj.weight"].T) * (y @ w[at + "mlp.up_proj.weight"].T)
        y = y @ w[at + "mlp.down_proj.weight"].T
        return x + (norm(y, at + "post_attention_layernorm_2.weight") if ouro else y)

    x, found = w["model.embed_tokens.weight"][ids], []
    for _ in range(config.get("total_ut_steps") or config["num_loops"]):
        for i in range(config["num_hidden_layers"]):
            x = layer(x, f"model.layers.{i}.")
        x = norm(x, "model.norm.weight")
        found.append(x)
    return found


def _through(kind: str, folder: Path) -> dict[str, Any]:
    from megatron_recursive.hf.convert.export import export_model
    from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM
    from megatron_recursive.inference.megatron_model import open_megatron

    ids = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(2))
    found: dict[str, Any] = {"import": _import(folder / "published", folder / "ckpt")}
    found["export"] = _export(folder / "ckpt", folder / "hf")
    export_model(str(folder / "ckpt"), str(folder / "back"), as_published=True, say=lambda _: None)
    with open_megatron(str(folder / "ckpt")) as (megatron, _):
        found["megatron"] = megatron(ids, output_blocks=True)
    with torch.no_grad():
        found["ours"] = RecursiveGPTForCausalLM.from_pretrained(folder / "hf").eval()(ids, output_blocks=True)
    return {"ids": ids, **found}


def error(reference: Tensor, other: Tensor) -> float:
    return float((reference - other).abs().max() / reference.abs().max())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_published_checkpoint_computes_what_it_is_said_to(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "published")
    (found,) = run_distributed(_through, 1, kind, tmp_path, timeout=240)
    weights = tensors(CONFIGS[kind])
    states = torch.stack(loops(CONFIGS[kind], weights, found["ids"]))
    reference = states[-1] @ weights["lm_head.weight"].T
    assert found["import"]["max_logit_error"] < 2e-5 and found["export"]["max_logit_error"] < 2e-5
    for model in (found["megatron"], found["ours"]):
        assert error(reference, model.logits) < 2e-5
        if kind == "ouro":
            gate = states @ weights["model.early_exit_gate.weight"][0] + weights["model.early_exit_gate.bias"]
            stays = torch.sigmoid(-gate[:-1]).cumprod(0)
            assert torch.allclose(model.block_halting[:-1], 1 - stays, atol=1e-5)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    unsaid = ("rope_scaling", "bos_token_id", "eos_token_id")  # a tokenizer has the ids, and there is none
    assert not any(name.endswith("_token_id") for name in config)
    said = {name: value for name, value in config.items() if name in CONFIGS[kind] and name not in unsaid}
    assert said == {name: CONFIGS[kind][name] for name in said} and len(said) > 18
    args = (tmp_path / "ckpt" / "megatron_args.txt").read_text().split()
    depth = {"ouro": 4, "nanbeige": 2}[kind]
    assert {"--recursion-family=looped", f"--num-refinement-blocks={depth}", "--state-norm=final"} <= {*args}


def test_measuring_a_published_folder_names_the_import(tmp_path: Path) -> None:
    folder = save("ouro", tmp_path / "published")
    with pytest.raises(UserError, match="convert import --hf .*then give --model CKPT"), open_model(str(folder)):
        pass


def test_only_what_a_published_class_computes_is_written_as_it(tmp_path: Path) -> None:
    source = open_source(str(save("ouro", tmp_path / "published")))
    recursion, unread = RecursionConfig.from_mapping(source.config.recursion), cast(Any, None)
    assert published_config(source.arch, recursion)["model_type"] == "ouro"
    for changed in (dataclasses.replace(recursion, state_norm="none"),
                    RecursionConfig(recursion_family="looped", embedding_multiplier=1.0)):  # fmt: skip
        with pytest.raises(UserError, match="OuroForCausalLM does not compute"):
            published_config(source.arch, changed)
    with pytest.raises(UserError, match="imported from ouro or nanbeige or huginn_raven; this one was not"):
        _ = MegatronModel(unread, {}, dataclasses.replace(source.arch, donor="llama"), recursion).published


REFUSED = {
    "a loop over the middle": ("nanbeige", {"enable_double_loop_split": True}, "enable_double_loop_split True"),
    "hyper-connections": ("nanbeige", {"enable_mhc": True, "enable_hyper_connection": True}, "enable_hyper_connection"),
    "depth attention": ("nanbeige", {"enable_depth_attention": True}, "enable_depth_attention"),
    "n-grams": ("nanbeige", {"emb_neighbor_num": 3}, "emb_neighbor_num 3"),
    "dynamic rope": ("nanbeige", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "derived heads": ("nanbeige", {"head_dim": None}, "shape"),
    "rope that is a word": ("ouro", {"rope_scaling": "linear"}, "rope_scaling 'linear'; it must be an object"),
    "a window": ("ouro", {"use_sliding_window": True}, "use_sliding_window"),
    "no depth": ("ouro", {"total_ut_steps": None}, "lacks total_ut_steps"),
    "half a loop": ("ouro", {"total_ut_steps": 2.5}, "total_ut_steps 2.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_of_ours_computes_is_refused(name: str, tmp_path: Path) -> None:
    kind, changes, said = REFUSED[name]
    head_dim = changes.pop("head_dim", 10)
    folder = save(kind, tmp_path / "published", **changes)
    if head_dim is None:
        (folder / "config.json").write_text(json.dumps({**CONFIGS[kind], "head_dim": None}))
    with pytest.raises(UserError, match=said):
        open_source(str(folder))


def test_weights_of_loops_say_how_many_there_are(tmp_path: Path) -> None:
    changes = {"loop_loss_weights": [0.1, 0.2], "torch_dtype": "bfloat16"}
    source = open_source(str(save("nanbeige", tmp_path / "published", **changes)))
    assert source.plan.num_blocks == 3 and "bfloat16" in str(source.config.dtype)
    last = open_source(str(save("nanbeige", tmp_path / "last", skip_loop_final_norm=True)))
    assert last.plan.state_norm == "none" and last.plan.num_blocks == 2
