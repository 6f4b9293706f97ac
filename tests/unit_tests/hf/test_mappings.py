"""Tables, transforms, layer choice; and every way in which a source can be wrong, in one sentence."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.configs import config_values, donor_family, read_config
from megatron_recursive.hf.convert.mappings import FAMILIES, items
from megatron_recursive.hf.convert.safetensors_files import INDEX, SafetensorsFolder
from megatron_recursive.hf.convert.sources import choose_layers, config_object, open_source
from megatron_recursive.hf.convert.tokenizer_files import copy_tokenizer
from megatron_recursive.hf.convert.torch_dist import TorchDistCheckpoint, TorchDistWriter
from megatron_recursive.hf.convert.transforms import QKV
from tests.distributed import run_command
from tests.unit_tests.hf.donors import BASE, DONORS, LLAMA3_ROPE, YARN, save_donor, write_folder


def architecture(kind: str, **changes: Any) -> Architecture:
    model_type, differing = DONORS[kind]
    family = FAMILIES[model_type]
    return read_config(family, config_object(family, {**BASE, **differing, **changes}, "here"), "here")


# --- tables and transforms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DONORS)
def test_every_row_splits_into_what_it_was_merged_from(kind: str) -> None:
    arch = architecture(kind)
    for item in items(FAMILIES[DONORS[kind][0]], arch):
        parts = [torch.randn(shape) for shape in item.hf.values()]
        merged = item.transform.merge(parts, arch)
        assert tuple(merged.shape) == item.megatron_shape(arch)
        for part, back in zip(parts, item.transform.split(merged, arch), strict=True):
            assert torch.equal(part, back)


def test_fused_rows_go_by_query_group() -> None:
    arch = architecture("qwen2")  # 6 heads of 10 in 2 groups
    key = 100 + torch.arange(20.0)[:, None]
    fused = QKV.merge([torch.arange(60.0)[:, None], key, key + 100], arch).flatten()
    assert fused[:30].tolist() == list(range(30)) and fused[30:40].tolist() == list(range(100, 110))
    assert fused[40:50].tolist() == list(range(200, 210)) and fused[50].item() == 30


@pytest.mark.parametrize("kind", DONORS)
def test_arguments_and_config_give_the_architecture_back(kind: str) -> None:
    arch = architecture(kind)
    assert Architecture.from_megatron(arch.to_megatron(), "here") == arch
    family = donor_family(arch)
    assert family is not None
    values = config_values(family, arch)
    assert read_config(family, config_object(family, values, "here"), "here") == arch
    assert family.model_type == DONORS[kind][0]


def test_an_export_reads_or_refuses_every_argument_that_a_checkpoint_binds() -> None:
    from megatron_recursive.training.architecture import ARCHITECTURE

    read: set[str] = set()

    class Noting(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            read.add(name)
            return super().get(name, default)

        def __getitem__(self, name: str) -> Any:
            read.add(name)
            return super().__getitem__(name)

    for kind in ("llama3, head_dim", "qwen3, yarn"):
        Architecture.from_megatron(Noting(architecture(kind).to_megatron()), "here")
    # Of a window, and of positions, that are refused; Megatron refuses the last one where it would count.
    assert set(ARCHITECTURE) - read == {"window_attn_skip_freq", "mrope_section", "add_position_embedding"}
    for name, value in (("glu_linear_offset", 1.0), ("activation_func_clamp_value", 7.0)):
        with pytest.raises(UserError, match=f"here has {name} = {value}, which has no Hugging Face counterpart"):
            Architecture.from_megatron({**architecture("qwen3").to_megatron(), name: value}, "here")


def test_a_donors_config_also_spells_its_positions_as_transformers_4_does() -> None:
    """transformers 4 knows no ``rope_parameters``: it would take a base of 10000 and no scaling, and say nothing."""
    for kind, base, scaling in (("llama3, head_dim", 500000.0, "llama3"), ("llama1, biases", 10000.0, "linear"),
                                ("mistral, one key head", 10000.0, None)):  # fmt: skip
        arch = architecture(kind)
        values = config_values(FAMILIES[DONORS[kind][0]], arch)
        assert values["rope_theta"] == base and (values["rope_scaling"] or {}).get("rope_type") == scaling
        both = {**values["rope_parameters"], **(values["rope_scaling"] or {}), "rope_theta": values["rope_theta"]}
        assert both == values["rope_parameters"]
        assert values.get("sliding_window", "no") == ("no" if scaling else None)


def test_a_sliding_window_that_no_layer_uses_is_none() -> None:
    assert architecture("qwen2", **WINDOW, max_window_layers=4) == architecture("qwen2")
    with pytest.raises(UserError, match="sliding window of 16"):
        architecture("qwen2", **WINDOW, max_window_layers=3)


def test_layer_choice() -> None:
    assert choose_layers(24, "uniform", 4, None) == [0, 8, 16, 23]
    assert choose_layers(24, "first", 3, None) == [0, 1, 2]
    assert choose_layers(24, "last", 3, None) == [21, 22, 23]
    assert choose_layers(24, "middle", 4, None) == [10, 11, 12, 13]
    assert choose_layers(24, None, None, "5,2,7") == [5, 2, 7]
    assert choose_layers(3, None, None, None) == [0, 1, 2]
    for total in range(1, 40):
        for count in range(1, total + 1):
            chosen = choose_layers(total, "uniform", count, None)
            assert len(set(chosen)) == count and chosen == sorted(chosen) and 0 <= chosen[0] and chosen[-1] < total


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((24, "uniform", 25, None), "--num-layers 25"), ((24, "first", None, None), "needs --num-layers"),
     ((24, None, None, "1,1"), "twice"), ((24, None, None, "1,24"), "0 to 23"), ((24, None, None, "a"), "whole number"),
     ((24, "first", 2, "1"), "excludes")],
)  # fmt: skip
def test_bad_layer_choices(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_layers(*arguments)


# --- torch_dist and safetensors files ---------------------------------------------------------------------------------


def test_torch_dist_files_read_back_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_recursive.hf.convert.torch_dist as module

    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    whole, stacked = torch.randn(37, 5), torch.randn(3, 11, 4, dtype=torch.bfloat16)
    writer = TorchDistWriter(tmp_path / "it")
    writer.add("whole", whole)
    for layer in range(3):
        writer.add("stacked", stacked[layer], layer, 3)
    writer.close()
    checkpoint = TorchDistCheckpoint(tmp_path / "it")
    assert torch.equal(checkpoint.get("whole"), whole) and torch.equal(checkpoint.get("stacked"), stacked)
    assert torch.equal(checkpoint.get("stacked", 1), stacked[1])


def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import os
    import pickle

    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "attacked"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match="may not hold posix.mkdir"):
        TorchDistCheckpoint(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_safetensors_shards_are_what_the_library_reads(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 3), "larger than a shard": torch.randn(16), "b": torch.randn(5, dtype=torch.bfloat16),
             "c": torch.randn(2, 2).half()}  # fmt: skip
    write_folder(tmp_path, {name: tensor.to("meta") for name, tensor in state.items()}, state.items(), shard_bytes=60)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2 and {*json.loads((tmp_path / INDEX).read_text())["weight_map"]} == {*state}
    read = {k: v for file in files for k, v in load_file(file).items()}
    assert read.keys() == state.keys() and all(torch.equal(read[k], v) for k, v in state.items())
    assert torch.equal(SafetensorsFolder.open(tmp_path).get("c"), state["c"])


# --- sources that are refused -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_donor("qwen3", tmp_path_factory.mktemp("donor"))


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return change


def _state(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 20) + b"x" * 40)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def _index(folder: Path) -> None:
    weights = {name: "model.safetensors" for name in load_file(folder / "model.safetensors")}
    weights["model.layers.9.gone"] = "model-9.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


WINDOW = {"use_sliding_window": True, "sliding_window": 16}
SLIDING = ["full_attention"] * 3 + ["sliding_attention"]
NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
BAD_SOURCES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "damaged"),
    "no safetensors": (_garble, "damaged"),
    "pickled weights": (_pickled, "pytorch_model.bin.*never read"),
    "missing shard": (_index, "model-9.safetensors is missing"),
    "missing tensor": (_state(lambda s: s.pop(UP)), f"lacks {UP}"),
    "surplus tensor": (_state(lambda s: s.update({"model.extra": torch.ones(2)})), "holds model.extra"),
    "wrong shape": (_state(lambda s: s.update({NORM: torch.ones(7)})), "has the shape 7"),
    "fp8": (_state(lambda s: s.update({UP: s[UP].to(torch.float8_e4m3fn)})), "quantised.*F8_E4M3"),
    "packed integers": (_state(lambda s: s.update({UP: s[UP].to(torch.int8)})), "quantised.*I8"),
    "gptq tensors": (_state(lambda s: s.update({"x.scales": torch.ones(2)})), "quantised.*x.scales"),
    **{method: (_config(quantization_config={"quant_method": method}), f"quantised \\({method}\\)")
       for method in ("gptq", "awq", "bitsandbytes", "fp8")},
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "config no json": (lambda f: f.joinpath("config.json").write_text("{"), "config.json cannot be read"),
    "unknown architecture": (_config(model_type="gpt_neox"), "model type 'gpt_neox'.*known are llama"),
    "classifier": (_config(architectures=["Qwen3ForSequenceClassification"]), "only Qwen3ForCausalLM"),
    "other layers": (_config(num_hidden_layers=5, layer_types=None), "lacks model.layers.4"),
    "activation": (_config(hidden_act="gelu"), "hidden_act gelu"),
    "sliding window": (_config(**WINDOW, layer_types=SLIDING), "sliding window of 16"),
    "linear attention": (_config(layer_types=["linear_attention"] * 4), "layers of the type linear_attention"),
    "dynamic": (_config(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}), "type dynamic"),
    "half yarn": (_config(rope_parameters=YARN, partial_rotary_factor=0.5), "rotates 0.5 of each head under YaRN"),
    "yarn of no turns": (_config(rope_parameters={**YARN, "beta_fast": -1}), "beta_fast -1; it must be a number"),
    "rope factors": (_config(rope_parameters={**LLAMA3_ROPE, "low_freq_factor": 2.0}), "low_freq_factor 2.0.*fixed"),
    "no head": (_config(head_dim=0), "head_dim 0; it must be a whole number above 0"),
    "no positions": (_config(max_position_embeddings=-1), "max_position_embeddings -1"),
    "half a layer": (_config(num_hidden_layers=1.5), "num_hidden_layers 1.5"),
    "absurd vocabulary": (_config(vocab_size=10**12), "vocab_size 1000000000000"),
    "no number": (_config(rms_norm_eps=float("nan")), "rms_norm_eps nan; it must be a number above 0"),
    "no rope": (_config(rope_parameters={"rope_type": "linear", "factor": 0, "rope_theta": 1e4}), "has factor 0"),
    "bias on attention alone": (_config(attention_bias=True), "Megatron has biases on every linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_source_that_cannot_be_converted_is_refused_in_one_sentence(name: str, donor: Path, tmp_path: Path) -> None:
    change, said = BAD_SOURCES[name]
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in donor.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    with pytest.raises(UserError, match=said) as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/nowhere/typo", "./typo", "models/llama/typo", "typo.gguf", "HERE/typo"])
def test_a_path_that_does_not_exist_is_not_looked_for_in_the_hub(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HERE").mkdir()
    with pytest.raises(UserError, match=f"{name} does not exist; give a model folder") as caught:
        open_source(name)
    assert "hf download" not in str(caught.value)


GARBAGE = {
    "{": "is not JSON",
    "[3]": "must hold a JSON object",
    '{"eos_token_id": "the last"}': "has eos_token_id 'the last', which is no token id",
    '{"eos_token_id": [2, -1]}': "which is no token id",
}


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_in_the_generation_settings_is_refused(text: str, tmp_path: Path) -> None:
    for name, content in (("tokenizer.json", "{}"), ("generation_config.json", text)):
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"generation_config.json .*{GARBAGE[text]}"):
        copy_tokenizer(tmp_path, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.grid
def test_the_command_says_it_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "tools/convert_hf.py", "import", "--hf", "nobody/nothing"]
    result = run_command([*command, "--out", str(tmp_path / "out")], timeout=120)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: nobody/nothing")
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())
