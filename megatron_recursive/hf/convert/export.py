"""Export: a Megatron checkpoint of any layout to a Hugging Face folder, proven before it gets its name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.data.progress import Progress
from megatron_recursive.errors import UserError
from megatron_recursive.hf import model as shipped
from megatron_recursive.hf.convert import proof
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.donor_import import TOKENIZER, checkpoint_fetch, recursive_rows
from megatron_recursive.hf.convert.files import new_folder
from megatron_recursive.hf.convert.mappings import (
    FAMILIES,
    Family,
    Item,
    donor_config,
    donor_family,
    items,
    recursive_config,
)
from megatron_recursive.hf.convert.report import Report
from megatron_recursive.hf.convert.safetensors_files import NAMES, Promise, write_folder
from megatron_recursive.hf.convert.sources import config_object, open_source, read_json
from megatron_recursive.hf.convert.tokenizer_files import (
    TOKEN_IDS,
    copy_tokenizer,
    difference,
    keep_class,
    prove_ids,
    token_ids,
    tokenizer_of,
    write_settings,
)
from megatron_recursive.hf.convert.torch_dist import TorchDistCheckpoint, iteration_folder
from megatron_recursive.hf.convert.transforms import VOCABULARY
from megatron_recursive.models.checkpoint_integrity import check_integrity
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan

AUTO_MAP = {
    "AutoConfig": "configuration_recursive_gpt.RecursiveGPTConfig",
    "AutoModel": "modeling_recursive_gpt.RecursiveGPTModel",
    "AutoModelForCausalLM": "modeling_recursive_gpt.RecursiveGPTForCausalLM",
}


@dataclass(frozen=True)
class MegatronModel:
    """A checkpoint and what its arguments say about it; ``own_class``: not a donor's class, even for a plain GPT."""

    checkpoint: TorchDistCheckpoint
    args: dict[str, Any]
    arch: Architecture
    recursion: RecursionConfig
    own_class: bool = False

    @property
    def plan(self) -> RecursionPlan:
        return build_plan(self.recursion)

    @property
    def family(self) -> Family:
        """The donor's own class for a plain GPT, where there is one that can express it."""
        donor = donor_family(self.arch) if self.plan.is_plain and not self.own_class else None
        return donor or FAMILIES["recursive_gpt"]

    def items(self) -> Iterator[Item]:
        return items(self.family, self.arch, extra=recursive_rows(self.plan))


def open_checkpoint(given: str) -> MegatronModel:
    """Read a checkpoint's index and arguments, and hold its tensors against them.

    Raises:
        UserError: a file is damaged, a tensor is missing, surplus or of another shape, or an option has no counterpart.
    """
    folder = iteration_folder(Path(given))
    check_integrity(folder)
    checkpoint = TorchDistCheckpoint(folder)
    args = checkpoint.arguments()
    arch = Architecture.from_megatron(args, given)
    if args.get("enable_recursive_refinement") is None:
        recursion = RecursionConfig(enable_recursive_refinement=False)
    else:
        recursion = RecursionConfig.from_mapping(args)
    model = MegatronModel(checkpoint, args, arch, recursion.resolved(embedding_init_std=arch.init_std))
    _check(model, given)
    return model


def _check(model: MegatronModel, where: str) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for item in model.items():
        shape = item.megatron_shape(model.arch)
        expected[item.key] = shape if item.layer is None else (model.arch.num_layers, *shape)
    found = model.checkpoint.shapes
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or surplus:
        what = f"lacks {missing[0]}, which its arguments ask for" if missing else f"holds {surplus[0]} besides"
        raise UserError(f"The checkpoint {where} {what}; nothing is exported that cannot be accounted for.")
    for key, shape in expected.items():
        if found[key] != shape:
            raise UserError(f"The checkpoint {where} has {key} as {found[key]}; its arguments say {shape}.")
        if model.checkpoint.dtypes[key] not in NAMES:
            raise UserError(f"The checkpoint {where} has {key} as {model.checkpoint.dtypes[key]}, which is no weight.")


def export_model(
    ckpt: str,
    out: str,
    tokenizer: str | None = None,
    proof_dtype: torch.dtype | None = torch.float32,
    say: Callable[[str], None] = print,
) -> Report:
    """Convert, prove, and put the folder at ``out``.

    Args:
        tokenizer: a tokenizer folder; None takes the one that the checkpoint was trained with, where it is found.
        proof_dtype: None skips the proof.

    Raises:
        UserError: one sentence on what is wrong; nothing is left at ``out``.
    """
    model, target = open_checkpoint(ckpt), Path(out)
    report, notes = Report(), []
    with new_folder(target, model.checkpoint.nbytes) as folder:
        found = _find_tokenizer(model, Path(ckpt), tokenizer, folder)
        before = None if found is None else tokenizer_of(found)
        if found is not None:
            keep_class(before, folder)
        ids = token_ids(folder, {name: getattr(before, name, None) for name in TOKEN_IDS})
        write_settings(folder, ids)
        _write_config(model, folder, ids)
        if before is not None and difference(before, tokenizer_of(folder)) and model.plan.is_plain:
            notes.append(f"transformers gives this tokenizer other ids beside a {model.family.architecture}, so that "
                         "the export is of our own class.")  # fmt: skip
            model = dataclasses.replace(model, own_class=True)
            _write_config(model, folder, ids)
        if found is None:
            notes.append("no tokenizer was found; give a folder with --tokenizer, or add one to the export.")
        elif (unproven := prove_ids(before, folder, str(found))) is not None:
            notes.append(unproven)
        say(f"{ckpt}: {model.arch.num_layers} layers, {model.plan.num_passes} passes, to {model.family.architecture}")
        report.facts["family"] = model.family.model_type
        _write_weights(model, folder, report)
        if model.family.model_type == "recursive_gpt":
            for name in shipped.REMOTE_CODE_FILES:
                shutil.copyfile(Path(shipped.__file__).parent / name, folder / name)
        _compare(model, folder)
        if proof_dtype is not None:
            report.max_logit_error = _prove(model, folder, proof_dtype)
    if model.checkpoint.training_state:
        report.add("dropped", "optimizer state", f"{model.checkpoint.training_state} tensors of training")
    say(report.describe())
    if proof_dtype is None:
        say("WARNING: the proof was skipped (--no-proof); nothing shows that the export computes what the model does.")
    for note in notes:
        say(f"WARNING: {note}")
    say(_cache_size(model, report))
    trust = ", trust_remote_code=True" if model.family.model_type == "recursive_gpt" else ""
    say(f"{target}: the model; load it with AutoModelForCausalLM.from_pretrained({str(target)!r}{trust})")
    return report


def _cache_size(model: MegatronModel, report: Report) -> str:
    """What keys and values of a token take, which is easily taken for that of a plain model of so many layers."""
    arch, dtype, passes = model.arch, _config(model)["dtype"], model.plan.num_passes
    layers = arch.num_layers * passes
    size = 2 * layers * arch.num_query_groups * arch.head_dim * getattr(torch, dtype).itemsize
    report.facts["cache_bytes_per_token"] = size
    line = f"cache: {size:,} bytes a token in {dtype}"
    return line if model.plan.is_plain else (
        f"{line}, since {passes} passes of {arch.num_layers} layers are {layers} cache layers; choose batch and "
        f"context by that, not by {arch.num_layers} layers."
    )


def _write_config(model: MegatronModel, folder: Path, ids: Mapping[str, Any]) -> None:
    config = {**_config(model), **ids}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(model: MegatronModel) -> dict[str, Any]:
    if model.family.model_type == "recursive_gpt":
        config = recursive_config(model.arch)
        config["num_layers"] = model.arch.num_layers
        config["num_hidden_layers"] *= model.plan.num_passes  # as the class stores it, for its caches
        config["plan"] = json.loads(model.plan.to_json())
        config["recursion"] = model.recursion.to_dict()
        config["auto_map"] = AUTO_MAP
    else:
        config = donor_config(model.family, model.arch)
    dtypes = {model.checkpoint.dtypes[item.key] for item in model.items()}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    config["dtype"] = str(widest).removeprefix("torch.")
    return config


def _find_tokenizer(model: MegatronModel, ckpt: Path, given: str | None, folder: Path) -> Path | None:
    """Copy the tokenizer into the export; where it was found."""
    if given is not None:
        if not copy_tokenizer(Path(given), folder):
            raise UserError(f"--tokenizer {given} holds no tokenizer.")
        return Path(given)
    named = model.args.get("tokenizer_model") if model.args.get("tokenizer_type") == "HuggingFaceTokenizer" else None
    places = [ckpt / TOKENIZER, model.checkpoint.folder.parent / TOKENIZER, *([Path(named)] if named else [])]
    return next((place for place in places if place.is_dir() and copy_tokenizer(place, folder)), None)


def _promises(model: MegatronModel) -> list[Promise]:
    return [
        Promise(name, shape, model.checkpoint.dtypes[item.key])
        for item in model.items()
        for name, shape in item.hf.items()
    ]


def _split(model: MegatronModel, item: Item) -> tuple[Tensor, ...]:
    return item.transform.split(model.checkpoint.get(item.key, item.layer), model.arch)


def _write_weights(model: MegatronModel, folder: Path, report: Report) -> None:
    def tensors(progress: Progress) -> Iterator[tuple[str, Tensor]]:
        for item in model.items():
            parts = _split(model, item)
            where = item.key if item.layer is None else f"{item.key}[{item.layer}]"
            padding = model.arch.padded_vocab_size - model.arch.vocab_size
            cut = f" without {padding} padding rows" if padding and item.transform is VOCABULARY else ""
            report.add("split" if len(parts) > 1 else "copied", where, ", ".join(item.hf) + cut)
            for name, part in zip(item.hf, parts, strict=True):
                if not torch.isfinite(part).all():
                    raise UserError(f"{where} of {model.checkpoint.folder} holds NaN or infinite values.")
                progress.advance(1, part.nbytes)
                yield name, part

    with Progress("exporting", model.checkpoint.nbytes, things="tensors") as progress:
        write_folder(folder, _promises(model), tensors(progress))


def _compare(model: MegatronModel, folder: Path) -> None:
    """Every written tensor, read back, equals its part of the checkpoint."""
    written = open_source(str(folder))
    with Progress("comparing", model.checkpoint.nbytes, things="tensors") as progress:
        for item in model.items():
            for name, part in zip(item.hf, _split(model, item), strict=True):
                if not torch.equal(written.get(name), part):
                    raise UserError(f"{name} reads back otherwise than it was written; check the disk of --out.")
                progress.advance(1, part.nbytes)


def _prove(model: MegatronModel, folder: Path, dtype: torch.dtype) -> float:
    """The folder's own model, plan and all, gives the checkpoint's logits."""
    source = open_source(str(folder))
    values = read_json(folder / "config.json")
    config = config_object(source.family, values, str(folder))
    tokens_BS = proof.proof_tokens(model.arch.vocab_size, tokenizer_of(folder), model.arch.max_positions)
    theirs = proof.hf_logits(source.family, config, source.weight, tokens_BS, dtype)
    ours = proof.megatron_logits(model.arch, model.recursion, checkpoint_fetch(model.checkpoint), tokens_BS, dtype)
    error = proof.relative_error(ours, theirs)
    proof.check(error, f"{model.checkpoint.folder} and its export")
    return error
