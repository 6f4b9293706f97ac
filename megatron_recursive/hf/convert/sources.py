"""Where pretrained weights come from: a safetensors folder, a name in the hub's cache, or a GGUF file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from megatron_recursive.data.tokenizer import is_hub_name
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.adapters import adapter_items
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.configs import check_sizes, family_of, read_config
from megatron_recursive.hf.convert.mappings import OWN, PUBLISHED, Family, Row, items, recursive_rows
from megatron_recursive.hf.convert.published_recurrent import RenamedTensors, open_raven
from megatron_recursive.hf.convert.safetensors_files import DTYPES, SafetensorsFolder
from megatron_recursive.hf.convert.stacks import layer_numbers
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plan.lora import LoRA

# Buffers that old checkpoints carry; every model computes them anew.
COMPUTED_SUFFIXES = (".rotary_emb.inv_freq", ".self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "freqs_cis")
_QUANTISED_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".weight_scale",
                       ".weight_scale_inv", ".SCB", ".weight_packed")  # fmt: skip


SIZES = ("num_hidden_layers", "num_layers", "num_layers_per_stack", "total_ut_steps", "num_loops", "H_cycles",
         "L_cycles", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "vocab_size", "max_position_embeddings")  # fmt: skip
FACTORS = ("rms_norm_eps", "norm_eps", "initializer_range", "embedding_scale", "rope_theta", "factor", "beta_fast",
           "beta_slow", "partial_rotary_factor", "attention_factor", "original_max_position_embeddings")


@dataclass
class Source:
    """A Hugging Face model, its tensors not yet read.

    Attributes:
        config: transformers' config object.
        shapes, dtypes: of every tensor there is, by name; a dtype is safetensors' own name.
        get: reads one tensor; bytes_read: how many were read so far.
        origin: how the weights were stored, for the report.
        folder: of a safetensors model; gguf: the file, of a GGUF model.
    """

    name: str
    family: Family
    config: Any
    arch: Architecture
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    get: Callable[[str], Tensor]
    bytes_read: Callable[[], int]
    nbytes: int
    origin: str
    folder: Path | None = None
    gguf: Path | None = None
    dropped: dict[str, str] = field(default_factory=dict)  # tensors that no row takes, and why that is right

    @property
    def own_recursion(self) -> RecursionConfig | None:
        """Of a model type that is recursive in itself."""
        if self.family.recursion is None:
            return None
        return RecursionConfig(**self.family.recursion.knobs(self.config, self.name)).resolved(embedding_init_std=1.0)

    @property
    def plan(self) -> RecursionPlan:
        if self.own_recursion is not None:
            return build_plan(self.own_recursion)
        return getattr(self.config, "recursion_plan", None) or RecursionPlan.plain()

    def lost_with_recursion(self, plan: RecursionPlan) -> list[str]:
        """What is to be warned of where the plan has none and that of the source has a factor on the embedding."""
        factor = self.plan.embedding_multiplier
        return [f"without recursion the embedding is not multiplied by {factor:g} any more, so that the plain model "
                f"differs from the first pass of {self.name}."] if plan.is_plain and factor != 1 else []  # fmt: skip

    def extra_rows(self) -> tuple[Row, ...]:
        """Rows of what recursion added to a model of ours."""
        if getattr(self.config, "pass_adapters", None):
            raise UserError(f"{self.name} has an adapter for each pass, which only its own class reads; go on from the "
                            "Megatron checkpoint that it was exported from.")  # fmt: skip
        return recursive_rows(self.plan, self.family)

    def weight(self, name: str) -> Tensor:
        """A tensor by name; a tied head is the embedding."""
        if name == "lm_head.weight" and self.arch.tied:
            name = "model.embed_tokens.weight"
        return self.get(name)


def open_source(given: str) -> Source:
    """Open and check a model: every tensor of its table is there in its shape, and nothing else.

    Raises:
        UserError: what is wrong, in one sentence.
    """
    path = Path(given)
    if path.suffix == ".gguf" and path.is_file():
        source = _open_gguf(path)
    elif path.is_dir():
        source = _open_folder(path, str(path))
    elif path.exists():
        raise UserError(f"{given} is a file; give a model folder, a .gguf file, or a name in the hub's cache.")
    else:
        source = _open_folder(cached_folder(given), given)
    _check_tensors(source)
    return source


def cached_folder(name: str) -> Path:
    """Where the hub's cache has a model.

    Raises:
        UserError: that cannot be a name, or the cache does not have it.
    """
    if not is_hub_name(name):
        raise UserError(f"{name} does not exist; give a model folder, a .gguf file, or a name in the hub's cache.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # a bad name, nothing cached, half a download: the hub has an error class for each
        raise UserError(
            f"{name} is neither a folder nor complete in the hub's cache; fetch it with: hf download {name}"
        ) from error


def is_published(folder: Path) -> bool:
    """Whether it holds a recursive model whose class only an import knows."""
    try:
        return read_json(folder / "config.json").get("model_type") in {family.model_type for family in PUBLISHED}
    except UserError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} cannot be read ({reason}); give a model folder.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return values


def _open_folder(folder: Path, name: str) -> Source:
    values, found = read_json(folder / "config.json"), SafetensorsFolder.open(folder)
    family, tensors = family_of(values, name), cast("SafetensorsFolder | RenamedTensors", found)
    if family.told_by_tensors:
        values, tensors = open_raven(values, found, name)
    config = config_object(family, values, name)
    return Source(
        name, family, config, read_config(family, config, name), tensors.shapes, tensors.dtypes, tensors.get,
        lambda: tensors.bytes_read, tensors.nbytes, "safetensors", folder,
    )  # fmt: skip


def _check_numbers(values: dict[str, Any], where: str) -> None:
    """Sizes that can be: transformers takes any, and fails, or not, where it uses them."""
    check_sizes(values, SIZES, where)
    ropes = [(name, values[name]) for name in ("rope_parameters", "rope_scaling") if values.get(name)]
    for name, rope in ropes:
        if not isinstance(rope, dict):
            raise UserError(f"The config.json of {where} has {name} {rope!r}; it must be an object.")
    for each in (values, *(rope for _, rope in ropes)):
        for name in (name for name in FACTORS if each.get(name) is not None):
            if type(each[name]) not in (int, float) or not 0 < each[name] < math.inf:
                raise UserError(f"The config.json of {where} has {name} {each[name]!r}; it must be a number above 0.")


def config_object(family: Family, values: dict[str, Any], where: str) -> Any:
    """transformers' own config of a family, with its defaults; no code of the folder is run."""
    _check_numbers(values, where)
    values = {k: v for k, v in values.items() if k not in ("auto_map", "architectures")}
    try:
        if values.get("model_type") == OWN.model_type:
            from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig

            return RecursiveGPTConfig.from_dict(values)
        if family.own_class:
            from megatron_recursive.hf.convert.published_looped import our_config

            return our_config(family, values, where)
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[family.model_type].from_dict(values)
    except UserError:
        raise
    except Exception as error:  # transformers' validators raise classes of the hub, of its own and of Python
        raise UserError(
            f"The config.json of {where} is not one that transformers takes "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})."
        ) from error


def _open_gguf(path: Path) -> Source:
    from transformers import AutoConfig

    from megatron_recursive.hf.convert.gguf_file import GgufFile

    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"transformers cannot read the GGUF file {path} ({reason}).") from error
    family = family_of({"model_type": config.model_type}, str(path))
    arch = read_config(family, config, str(path))
    file = GgufFile(path, (name for item in items(family, arch) for name in item.hf), arch)
    return Source(
        str(path), family, config, arch, file.shapes, dict.fromkeys(file.shapes, "F32"), file.get,
        lambda: file.bytes_read, file.nbytes, "GGUF, dequantised", gguf=path,
    )  # fmt: skip


def _check_tensors(source: Source) -> None:
    for name, dtype in source.dtypes.items():
        if dtype not in DTYPES or name.endswith(_QUANTISED_SUFFIXES):
            raise UserError(f"{source.name} is quantised ({name} is {dtype}); give the unquantised model.")
    expected: dict[str, tuple[int, ...]] = {}
    held = [*items(source.family, source.arch, extra=recursive_rows(source.plan, source.family))]
    if (adapters := getattr(source.config, "pass_adapters", None)) is not None:
        lora = LoRA(adapters["rank"], adapters["alpha"], tuple(adapters["targets"]), per_pass=True)
        held += adapter_items([*held], lora, source.plan, source.arch)
    for item in held:
        expected.update(item.hf)
    missing = [name for name in expected if name not in source.shapes]
    if missing:
        raise UserError(
            f"{source.name} lacks {missing[0]}{_and_more(missing)}, which a {source.family.model_type} model of its "
            "config.json has; fetch the model again."
        )
    for name in source.shapes.keys() - expected.keys():
        source.dropped[name] = _why_surplus(source, name)
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise UserError(
                f"{source.name}: {name} has the shape {_by(source.shapes[name])}, where its config.json says "
                f"{_by(shape)}."
            )


def _why_surplus(source: Source, name: str) -> str:
    if name.endswith(COMPUTED_SUFFIXES):
        return "computed, not learned"
    if name == "lm_head.weight" and source.arch.tied:
        import torch

        if torch.equal(source.get(name), source.get("model.embed_tokens.weight")):
            return "equal to the embedding, to which it is tied"
        raise UserError(
            f"{source.name} ties its head to the embedding (tie_word_embeddings), but holds another lm_head.weight."
        )
    if name == "rope_freqs.weight":
        raise UserError(
            f"{source.name} scales its rotary frequencies (rope_freqs.weight, of Llama 3.1 and later), which is not "
            "read from GGUF; import the model from its safetensors."
        )
    if name in source.family.added.values():
        return "this recursion has none"
    raise UserError(
        f"{source.name} holds {name} ({_by(source.shapes[name])}), which a {source.family.model_type} model does not "
        "have; its meaning would be lost."
    )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def choose_layers(total: int, selection: str | None, count: int | None, explicit: str | None) -> list[int]:
    """Which layers of the donor are kept.

    ``uniform`` keeps the first and the last and spreads the others evenly: 4 of 24 are 0, 8, 16, 23.
    """
    if explicit is not None:
        if selection is not None or count is not None:
            raise UserError("--layers excludes --layer-selection and --num-layers; give either.")
        return layer_numbers(explicit, "--layers", total)
    if selection is None and count is None:
        return list(range(total))
    if count is None:
        raise UserError(f"--layer-selection {selection} needs --num-layers, how many layers to keep.")
    if not 1 <= count <= total:
        raise UserError(f"--num-layers {count} must lie between 1 and the model's {total} layers.")
    if selection == "first":
        return list(range(count))
    if selection == "last":
        return list(range(total - count, total))
    if selection == "middle":
        start = (total - count) // 2
        return list(range(start, start + count))
    return [math.ceil(index * (total - 1) / (count - 1)) if count > 1 else 0 for index in range(count)]


__all__ = ["Source", "choose_layers", "config_object", "open_source", "read_json"]
