"""Published recurrent checkpoints in their original names, against their formula in plain torch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.published_recurrent import published_config
from megatron_recursive.hf.convert.sources import open_source
from megatron_recursive.plan import RecursionConfig
from megatron_recursive.plan.added_parameters import sampled_start
from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.hf.test_convert import _export, _import, _quiet

WIDTH, HEADS, FFN, VOCAB, RECURRENCES = 60, 5, 52, 131, 4
COUNTS = {"prelude": 2, "core_block": 3, "coda": 1}
CONFIG: dict[str, Any] = {
    "model_type": "huginn_raven", "architectures": ["RavenForCausalLM"], "n_embd": WIDTH, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "intermediate_size": FFN, "vocab_size": VOCAB, "block_size": 64,
    "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 3, "n_layers_in_coda": 1, "norm_eps": 1e-6,
    "mean_recurrence": RECURRENCES, "mean_backprop_depth": 2, "qk_bias": True, "tie_embeddings": True, "bias": False,
    "injection_type": "linear", "state_init": "like-init", "torch_dtype": "bfloat16",
}  # fmt: skip
RETROFIT = {**CONFIG, "qk_bias": False, "tie_embeddings": False, "max_position_embeddings": 48, "rope_theta": 500.0,
            "init_values": {"std": 0.3, "embed_scale": 1.0}, "n_heads": HEADS}  # fmt: skip
KINDS = {
    "huginn": CONFIG,
    "llama": {**RETROFIT, "num_key_value_heads": 1, "initial_state_mode": "random"},
    "olmo": {**RETROFIT, "head_dim": 14},
    "olmo from the input": {**RETROFIT, "head_dim": 14, "initial_state_mode": "embed-init"},
}


def original(kind: str, **changes: Any) -> dict[str, Tensor]:
    """Random tensors under the names of the original modelling files."""
    config, generator = {**KINDS[kind], **changes}, torch.Generator().manual_seed(3)
    heads = config["num_attention_heads"]
    size = config.get("head_dim", WIDTH // heads)
    queries, keys = heads * size, config["num_key_value_heads"] * size
    norms = 4 if kind == "huginn" else 2
    shapes = {"transformer.wte.weight": (VOCAB, WIDTH), "transformer.ln_f.weight": (WIDTH,),
              "transformer.adapter.weight": (WIDTH, 2 * WIDTH), "freqs_cis": (1, 64, 1, size // 2, 2),
              **({} if config["tie_embeddings"] else {"lm_head.weight": (VOCAB, WIDTH)})}  # fmt: skip
    for place in (f"transformer.{stack}.{i}." for stack, count in COUNTS.items() for i in range(count)):
        layer = {"attn.Wqkv": (queries + 2 * keys, WIDTH), "attn.proj": (WIDTH, queries), "mlp.fc": (2 * FFN, WIDTH),
                 "mlp.proj": (WIDTH, FFN), **{f"norm_{n + 1}": (WIDTH,) for n in range(norms)}}  # fmt: skip
        layer.update({"attn.q_norm": (queries,), "attn.k_norm": (keys,)} if "olmo" in kind else {})
        shapes.update({f"{place}{name}.weight": shape for name, shape in layer.items()})
        shapes.update({f"{place}attn.qk_bias": (2, 1, heads, size)} if config["qk_bias"] else {})
    found = {name: 0.09 * torch.randn(shape, generator=generator) + ("norm" in name or "ln_f" in name)
             for name, shape in shapes.items()}  # fmt: skip
    base = 50000.0 if kind == "huginn" else config["rope_theta"]
    angles = torch.arange(64)[:, None] / base ** (torch.arange(0, size, 2) / size)
    return {**found, "freqs_cis": torch.stack([angles.cos(), angles.sin()], -1)[None, :, None].contiguous()}


def formula(kind: str, w: dict[str, Tensor], ids: Tensor, start: Tensor) -> Tensor:
    config = KINDS[kind]
    size, groups = config.get("head_dim", WIDTH // HEADS), config["num_key_value_heads"]
    base = 50000.0 if kind == "huginn" else config["rope_theta"]
    angles = torch.arange(ids.shape[1])[:, None] / base ** (torch.arange(0, size, 2) / size)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:  # [B, heads, S, size]: neighbours (Huginn), or halves
        a, b = (x[..., 0::2], x[..., 1::2]) if kind == "huginn" else x.chunk(2, -1)
        turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
        return torch.stack(turned, -1).flatten(-2) if kind == "huginn" else torch.cat(turned, -1)

    def attend(x: Tensor, place: str) -> Tensor:
        q, k, v = (x @ w[f"{place}attn.Wqkv.weight"].T).split([HEADS * size, groups * size, groups * size], -1)
        if "olmo" in kind:
            q, k = norm(q, f"{place}attn.q_norm"), norm(k, f"{place}attn.k_norm")
        q, k, v = (each.unflatten(-1, (-1, size)) for each in (q, k, v))
        if config["qk_bias"]:
            q, k = q + w[f"{place}attn.qk_bias"][0], k + w[f"{place}attn.qk_bias"][1]
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2) @ w[f"{place}attn.proj.weight"].T

    def mlp(x: Tensor, place: str) -> Tensor:
        gate, up = (x @ w[f"{place}mlp.fc.weight"].T).chunk(2, -1)
        return (F.silu(gate) * up) @ w[f"{place}mlp.proj.weight"].T

    def stack(x: Tensor, name: str) -> Tensor:
        for p in (f"transformer.{name}.{i}." for i in range(COUNTS[name])):
            if kind == "huginn":
                x = norm(x + attend(norm(x, f"{p}norm_1"), p), f"{p}norm_2")
                x = norm(x + mlp(norm(x, f"{p}norm_3"), p), f"{p}norm_4")
            elif kind == "llama":
                x = x + attend(norm(x, f"{p}norm_1"), p)
                x = x + mlp(norm(x, f"{p}norm_2"), p)
            else:
                x = x + norm(attend(x, p), f"{p}norm_1")
                x = x + norm(mlp(x, p), f"{p}norm_2")
        return x

    e = stack(w["transformer.wte.weight"][ids] * (math.sqrt(WIDTH) if kind == "huginn" else 1.0), "prelude")
    s = e if "input" in kind else start.expand_as(e)
    for _ in range(RECURRENCES):
        s = stack(torch.cat([s, e], -1) @ w["transformer.adapter.weight"].T, "core_block")
    s = stack(norm(s, "transformer.ln_f") if kind == "huginn" else s, "coda")
    return norm(s, "transformer.ln_f") @ w.get("lm_head.weight", w["transformer.wte.weight"]).T


def written(kind: str, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    save_file(original(kind), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**KINDS[kind], **changes}))
    return folder


def _imported(kind: str, folder: Path) -> tuple[float, float, float, bool]:
    from megatron_recursive.hf.convert.verify import agree, verify
    from megatron_recursive.inference.megatron_model import open_megatron

    source, target = written(kind, folder / "source"), folder / "ckpt"
    proven = _import(source, target)
    _export(target, folder / "back")
    ids = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
    std = math.sqrt(2 / 5) if kind == "huginn" else 0.3
    start = sampled_start(torch.arange(17), WIDTH, std)
    expected, zeros = (formula(kind, original(kind), ids, s) for s in (start, torch.zeros_like(start)))
    with open_megatron(str(target)) as (megatron, _):
        ours = megatron(ids).logits
    error, moved = ((each - expected).abs().max() / expected.abs().max() for each in (ours, zeros))
    same = agree(verify(str(source), str(folder / "back"), say=_quiet))
    _published_again(kind, source, target, folder / "published", ids, start)
    return proven["max_logit_error"], float(error), float(moved), same


def _published_again(kind: str, source: Path, ckpt: Path, out: Path, ids: Tensor, start: Tensor) -> None:
    """As published: the same tensors, the config's keys; and of changed weights, the formula of what is written."""
    from megatron_recursive.hf.convert import export, proof

    export.export_model(str(ckpt), str(out), as_published=True, say=_quiet)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    angles = before.pop("freqs_cis")
    if kind == "huginn":
        assert torch.allclose(angles, after.pop("freqs_cis"), atol=1e-5)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before), kind
    stated, config = KINDS[kind], json.loads((out / "config.json").read_text())
    unsaid = {"torch_dtype", "init_values"} | ({"block_size"} if kind != "huginn" else set())  # tensors have a dtype
    assert {name: config[name] for name in stated if name not in unsaid} == {
        name: value for name, value in stated.items() if name not in unsaid}  # fmt: skip
    assert not {name for name, value in config.items() if value is None} - {"rope_scaling"}
    first, again = open_source(str(source)), open_source(str(out))
    assert (first.arch, first.plan) == (again.arch, again.plan)

    class Moved(export.TorchDistCheckpoint):
        def get(self, key: str, layer: int | None = None) -> Tensor:
            tensor = super().get(key, layer)
            return tensor if key.endswith("qkv.bias") else tensor * 1.1 + 0.01

    model = export.open_checkpoint(str(ckpt))
    moved = Moved.__new__(Moved)
    vars(moved).update(vars(model.checkpoint))
    trained = dataclasses.replace(model, checkpoint=moved, as_published=True)
    place = out.with_name(out.name + "-moved")
    export.write_model(trained, ckpt, place, None, torch.float32, _quiet, 50_000)
    written_by = {name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert not torch.equal(written_by["transformer.wte.weight"], before["transformer.wte.weight"])
    expected = formula(kind, written_by, ids, start)
    again = open_source(str(place))
    text = proof.Text(ids, torch.arange(ids.shape[1]).expand_as(ids))
    ours = proof.hf_logits(again.family, again.config, again.weight, text, torch.float32)
    assert float((ours - expected).abs().max() / expected.abs().max()) < 5e-6, kind


@pytest.mark.parametrize("kind", grid(KINDS, quick=["huginn"]))
def test_the_import_computes_the_formula_and_exports(kind: str, tmp_path: Path) -> None:
    ((proven, error, moved, same),) = run_distributed(_imported, 1, kind, tmp_path, timeout=240)
    assert 0 < proven < 2e-6 and error < 2e-6 and same, (proven, error)
    assert (moved < 1e-6) == ("input" in kind), moved


OTHERS: list[tuple[str, dict[str, Any], str]] = [  # knobs or fields of the architecture, and what is said of them
    ("huginn", {"injection": "add"}, "hold --injection add"),
    ("huginn", {"boundary": "gate"}, "hold --boundary gate"),
    ("olmo", {"recurrence_step": "mean"}, "hold --recurrence-step mean"),
    ("huginn", {"state_norm": "none"}, "hold --state-norm none"),
    ("llama", {"state_norm": "core-end"}, "hold --state-norm core-end"),
    ("huginn", {"embedding_multiplier": 2.0}, "hold --embedding-multiplier 2.0"),
    ("huginn", {"linear_factor": 2}, "hold rope scaling"), ("llama", {"head_dim": 14}, "hold --kv-channels 14"),
    ("llama", {"qkv_bias": True}, "hold --add-qkv-bias"), ("llama", {"activation": "gelu"}, "hold activation gelu"),
    ("olmo", {"recursion_family": "looped"}, "--recursion-family is looped"),
    ("olmo", {"enable_recursive_refinement": False}, "a plain GPT"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_what_the_format_does_not_hold_is_refused_by_its_flag(number: int, tmp_path: Path) -> None:
    kind, changes, message = OTHERS[number]
    source = open_source(str(written(kind, tmp_path / "model")))
    fields = {name: value for name, value in changes.items() if hasattr(source.arch, name)}
    knobs = {name: value for name, value in changes.items() if name not in fields}
    recursion = RecursionConfig.from_mapping(source.config.recursion)
    if knobs.get("recursion_family") == "looped":
        recursion = RecursionConfig(embedding_multiplier=1.0)
    published_config(source.arch, RecursionConfig.from_mapping(source.config.recursion))
    with pytest.raises(UserError, match=message):
        published_config(dataclasses.replace(source.arch, **fields), dataclasses.replace(recursion, **knobs))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [("huginn", {"injection_type": "add"}, "injection_type 'add'.*only 'linear'"),
     ("olmo", {"initial_state_mode": "skip-adapter"}, "initial_state_mode 'skip-adapter'"),
     ("llama", {"n_heads": 7}, "v_proj.weight has the shape 20 x 60, where its config.json says"),
     ("huginn", {"n_embd": 30}, "has the shape"), ("huginn", {"mean_recurrence": "4"}, "is no config .*TypeError"),
     ("huginn", {"num_attention_heads": 7}, "qk_bias of .* does not fit its config.json"),
     ("huginn", {"n_layers_in_coda": 2}, "lacks model.layers.6"),
     ("huginn", {"rope_base": 10000.0}, "freqs_cis of .* rotations of base 10000"),
     ("huginn", {"rope_base": "x"}, "rope_theta 'x'; it must be a number"),
     ("huginn", {"test_time_noise": 0.1}, "test_time_noise 0.1"),
     ("huginn", {"init_values": "x"}, "is no config .*AttributeError"),
     ("llama", {"init_values": {"embed_scale": "abc"}}, "is no config .*ValueError"),
     ("llama", {"num_key_value_heads": "1"}, "num_key_value_heads '1'; it must be a whole number"),
     ("olmo", {"head_dim": 14.0}, "head_dim 14.0; it must"), ("huginn", {"n_embd": -60}, "n_embd -60; it must"),
     ("olmo", {"n_layers_in_recurrent_block": 3.0}, "n_layers_in_recurrent_block 3.0; it must"),
     ("olmo", {"n_layers_in_coda": 1.0}, "--num-coda-layers must be a whole number"),
     ("llama", {"rope_parameters": "x"}, "is no config .*TypeError")],
)  # fmt: skip
def test_what_is_not_known_is_refused_in_a_sentence(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_source(str(written(kind, tmp_path / "model", **changes)))


def test_what_a_config_may_say_is_read(tmp_path: Path) -> None:
    linear = written("llama", tmp_path / "linear", rope_scaling={"type": "linear", "factor": 4.0})
    assert (arch := open_source(str(linear)).arch).linear_factor == 4 and arch.rotary_base == 500
    stated = {"init_values": {"std": 0.5, "embed_scale": 2.0}, "rope_parameters": {"rope_type": "default"}}
    huginn = open_source(str(written("huginn", tmp_path / "huginn", **stated)))
    assert huginn.arch.rotary_base == 50000 and "bfloat16" in str(huginn.config.dtype)
    assert (huginn.plan.embedding_multiplier, huginn.plan.state_std) == (2.0, 1.0)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = written("llama", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    del values["rope_theta"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="is no config .*rope_theta"):
        open_source(str(folder))
