"""Export: a Megatron checkpoint of any layout to a Hugging Face folder, proven before it gets its name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.accounting import cache_bytes_per_token
from megatron_recursive.data.progress import Progress
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert import proof, published_looped, published_recurrent
from megatron_recursive.hf.convert.adapters import adapter_items, choose_mode, keys_beside, write_peft
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.configs import config_values, donor_family
from megatron_recursive.hf.convert.donor_import import EMBEDDING, TOKENIZER, checkpoint_fetch
from megatron_recursive.hf.convert.files import new_folder
from megatron_recursive.hf.convert.mappings import FAMILIES, OWN, Family, Item, items, recursive_rows
from megatron_recursive.hf.convert.model_card import Exported, write_card
from megatron_recursive.hf.convert.reading import Once, Sums, remembering, room_for_passes
from megatron_recursive.hf.convert.report import Report
from megatron_recursive.hf.convert.safetensors_files import NAMES, SHARD_BYTES, FolderWriter
from megatron_recursive.hf.convert.sources import open_source
from megatron_recursive.hf.convert.tokenizer_files import (
    TOKEN_IDS,
    also_turn_ends,
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
from megatron_recursive.hf.model import write_remote_code
from megatron_recursive.hf.model.exits_recursive_gpt import GENERATION_ENTRIES
from megatron_recursive.models.checkpoint_integrity import check_integrity
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plan.added_parameters import EVERY
from megatron_recursive.plan.lora import LoRA
from megatron_recursive.plan.supervision_steps import whole

IN_FP32 = tuple(each.key for each in EVERY if each.in_fp32)
# What writes a checkpoint as the published model that it came from.
AS_PUBLISHED = {"ouro": published_looped, "nanbeige": published_looped, "huginn_raven": published_recurrent}
Logits = Callable[[proof.Text, torch.dtype], Tensor]
Writer = FolderWriter | published_recurrent.JoinedWriter
AUTO_MAP = {
    "AutoConfig": "configuration_recursive_gpt.RecursiveGPTConfig",
    "AutoModel": "modeling_recursive_gpt.RecursiveGPTModel",
    "AutoModelForCausalLM": "modeling_recursive_gpt.RecursiveGPTForCausalLM",
    # "transformers serve" loads a class of its own code or this one; any causal model may stand here.
    "AutoModelForDecision": "modeling_recursive_gpt.RecursiveGPTForCausalLM",
}


@dataclass(frozen=True)
class MegatronModel:
    """A checkpoint and what its arguments say about it.

    ``own_class``: not a donor's class, even for a plain GPT; ``as_published``: as the published model it came from.
    ``lora``: adapters that are to go out, merged into the weights where passes share them.
    """

    checkpoint: TorchDistCheckpoint
    args: dict[str, Any]
    arch: Architecture
    recursion: RecursionConfig
    own_class: bool = False
    as_published: bool = False
    lora: LoRA | None = None

    @property
    def plan(self) -> RecursionPlan:
        return build_plan(self.recursion)

    @property
    def published(self) -> ModuleType:
        if self.arch.donor not in AS_PUBLISHED:
            known = " or ".join(AS_PUBLISHED)
            raise UserError(f"--as-published is for checkpoints that were imported from {known}; this one was not.")
        return AS_PUBLISHED[self.arch.donor]

    @property
    def family(self) -> Family:
        """The donor's own class, where there is one that can express it."""
        if self.as_published:
            return FAMILIES[str(self.arch.donor)]
        return (None if self.own_class else donor_family(self.arch, self.recursion)) or OWN

    def items(self) -> Iterator[Item]:
        weights = [*items(self.family, self.arch, extra=recursive_rows(self.plan, self.family))]
        yield from weights
        if self.lora is not None and self.lora.per_pass:
            yield from adapter_items(weights, self.lora, self.plan, self.arch)

    def sources(self, item: Item) -> list[str]:
        """The names of what an item is made of: its tensor, and where adapters are merged A and B."""
        merges = self.lora is not None and not self.lora.per_pass
        factors = keys_beside(item, self.lora, self.plan, self.arch) if merges and self.lora else {}
        return [item.name, *(key for pair in factors.values() for key in pair)]

    def merged(self, tensors: list[Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
        """The tensors of :meth:`sources` as one, summed in fp64; in the weight's dtype, or another."""
        weight, *factors = tensors
        if self.lora is None or not factors:
            return weight
        down, up = (each.double() for each in factors)
        return (weight.double() + self.lora.scale * (up @ down)).to(dtype or weight.dtype)


def open_checkpoint(given: str, *, averaged: bool = False, checked: bool = True) -> MegatronModel:
    """Read a checkpoint's index and arguments, and hold its tensors against them.

    Raises:
        UserError: a file is damaged, a tensor is missing, surplus or of another shape, or an option has no counterpart.
    """
    folder = iteration_folder(Path(given))
    if checked:
        check_integrity(folder)
    checkpoint = TorchDistCheckpoint(folder, averaged=averaged)
    args = checkpoint.arguments()
    arch = Architecture.from_megatron(args, given)
    if args.get("enable_recursive_refinement") is None:
        recursion = RecursionConfig(enable_recursive_refinement=False)
    else:
        recursion = RecursionConfig.from_stored(args)
    lora = LoRA.from_args(args)
    model = MegatronModel(checkpoint, args, arch, whole(recursion.resolved(embedding_init_std=arch.init_std)),
                          own_class=lora is not None and lora.per_pass, lora=lora)  # fmt: skip
    _check(model, given)
    return model


def _check(model: MegatronModel, where: str) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for item in model.items():
        shape = item.megatron_shape(model.arch)
        expected[item.key] = shape if item.layer is None else (model.arch.num_layers, *shape)
    for item in () if model.lora is None else adapter_items(model.items(), model.lora, model.plan, model.arch):
        expected[item.key] = item.megatron_shape(model.arch)
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
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    as_published: bool = False,
    averaged: bool = False,
    lora: str | None = None,
) -> Report:
    """Convert, prove, and put the folder at ``out``.

    Args:
        tokenizer: a tokenizer folder; None takes the one that the checkpoint was trained with, where it is found.
        proof_dtype: None skips the proof.
        dtype: of the exported weights; None leaves them as they are stored.
        as_published: in the format of the looped or recurrent model that the checkpoint came from.
        averaged: export the averages of the weights.
        lora: how adapters leave, one of ``plan.lora.MODES``.

    Raises:
        UserError: one sentence on what is wrong; nothing is left at ``out``.
    """
    model = dataclasses.replace(open_checkpoint(ckpt, averaged=averaged), as_published=as_published)
    if dtype is not None:
        model = dataclasses.replace(model, checkpoint=_Cast(model.checkpoint, dtype))
    mode = choose_mode(lora, model.lora, ckpt)
    if mode == "base":
        model = dataclasses.replace(model, lora=None, own_class=False)
    if as_published:
        _config(model)  # refuses what the published model is not
    if mode != "peft" or model.lora is None:
        return write_model(model, Path(ckpt), Path(out), tokenizer, proof_dtype, say, shard_bytes)
    report, read = Report(), checkpoint_fetch(model.checkpoint)
    report.facts["tensors"] = write_peft([*model.items()], model.lora, model.plan, model.arch, read, Path(out))
    say(f"{out}: the adapters; load them with PeftModel.from_pretrained(BASE, {out!r}), BASE being what --lora base "
        "exports.")  # fmt: skip
    return report


def write_model(
    model: MegatronModel, ckpt: Path, target: Path, tokenizer: str | None, proof_dtype: torch.dtype | None,
    say: Callable[[str], None], shard_bytes: int, expected: Logits | None = None,
) -> Report:  # fmt: skip
    """As :func:`export_model`, of a checkpoint that is open.

    Args:
        ckpt: where it was found; expected: the logits that the folder must give, where not the checkpoint's own.
    """
    report, notes = Report(), []
    with new_folder(target, model.checkpoint.nbytes) as folder:
        found = _find_tokenizer(model, ckpt, tokenizer, folder)
        before = None if found is None else tokenizer_of(found)
        if found is not None:
            keep_class(before, folder)
        of_tokenizer = {name: getattr(before, name, None) for name in TOKEN_IDS}
        ids = token_ids(folder, of_tokenizer, model.arch.vocab_size)
        if before is not None and model.args.get("chat_data"):
            ids["eos_token_id"] = also_turn_ends(ids["eos_token_id"], before)
        write_settings(folder, ids, without=GENERATION_ENTRIES if model.plan.is_plain else ())
        _write_config(model, folder, ids)
        if before is not None and difference(before, tokenizer_of(folder)) and model.family is not OWN:
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
        if model.family is OWN:
            write_remote_code(folder)
        text = proof.proof_text(model.arch.vocab_size, tokenizer_of(folder), model.arch.max_positions)
        sums, logits = _write_weights(model, folder, report, text, proof_dtype, shard_bytes, expected)
        report.facts["bytes_read"] = model.checkpoint.bytes_read
        _prove(model, folder, report, sums, logits, text, proof_dtype)
        write_card(folder, target.absolute().name, Exported(
            model.family.architecture, model.family is OWN, model.arch.num_layers, model.plan, model.checkpoint.folder,
            ckpt, model.args, report.max_logit_error, isinstance(model.checkpoint, _Cast)))  # fmt: skip
    if model.checkpoint.training_state:
        report.add("dropped", "optimizer state", f"{model.checkpoint.training_state} tensors of training")
    say(report.describe())
    if proof_dtype is None:
        say("WARNING: the proof was skipped (--no-proof); nothing shows that the export computes what the model does.")
    for note in notes:
        say(f"WARNING: {note}")
    say(_cache_size(model, report))
    trust = ", trust_remote_code=True" if model.family is OWN else ""
    if model.as_published:
        say(f"{target}: the model, for what knows {model.family.model_type}; the code of its class is not among it.")
        return report
    say(f"{target}: the model; load it with AutoModelForCausalLM.from_pretrained({str(target)!r}{trust})")
    return report


def _cache_size(model: MegatronModel, report: Report) -> str:
    """What keys and values of a token take, which is easily taken for that of a plain model of so many layers."""
    arch, dtype, passes = model.arch, _dtype(model), model.plan.num_passes
    layers = model.plan.unrolled_layers(arch.num_layers)
    size = cache_bytes_per_token(arch.shape(1), model.plan, getattr(torch, dtype).itemsize)
    report.facts["cache_bytes_per_token"] = size
    line = f"cache: {size:,} bytes a token in {dtype}"
    return line if model.plan.is_plain else (
        f"{line}, since {passes} passes through {arch.num_layers} layers are {layers} cache layers; choose batch and "
        f"context by that, not by {arch.num_layers} layers."
    )


def _write_config(model: MegatronModel, folder: Path, ids: Mapping[str, Any]) -> None:
    if model.as_published:  # its class has ids of its own
        ids = {name: value for name, value in ids.items() if value is not None}
    config = {**_config(model), **ids}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(model: MegatronModel) -> dict[str, Any]:
    if model.as_published:
        config = model.published.published_config(model.arch, model.recursion)
        return {**config, model.published.DTYPE: _dtype(model)}
    config = config_values(model.family, model.arch, model.recursion)
    if model.family is OWN:
        config["num_hidden_layers"] = model.plan.unrolled_layers(model.arch.num_layers)  # as its class says it
        config.update(plan=json.loads(model.plan.to_json()), recursion=model.recursion.to_dict(), auto_map=AUTO_MAP)
        if model.lora is not None and model.lora.per_pass:
            adapters = {"rank": model.lora.rank, "alpha": model.lora.alpha, "targets": list(model.lora.targets)}
            config["pass_adapters"] = adapters
    config["dtype"] = _dtype(model)
    return config


def _dtype(model: MegatronModel) -> str:
    dtypes = {model.checkpoint.dtypes[item.key] for item in model.items() if item.key not in IN_FP32}
    return str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")


def _find_tokenizer(model: MegatronModel, ckpt: Path, given: str | None, folder: Path) -> Path | None:
    """Copy the tokenizer into the export; where it was found."""
    if given is not None:
        if not copy_tokenizer(Path(given), folder):
            raise UserError(f"--tokenizer {given} holds no tokenizer.")
        return Path(given)
    named = model.args.get("tokenizer_model") if model.args.get("tokenizer_type") == "HuggingFaceTokenizer" else None
    if (ckpt / "config.json").is_file():  # an export that is unrolled
        return ckpt if copy_tokenizer(ckpt, folder) else None
    places = [ckpt / TOKENIZER, model.checkpoint.folder.parent / TOKENIZER, *([Path(named)] if named else []), ckpt]
    return next((place for place in places if place.is_dir() and copy_tokenizer(place, folder)), None)


def _promised(model: MegatronModel) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=model.checkpoint.dtypes[item.key], device="meta")
        for item in model.items()
        for name, shape in item.hf.items()
    }


def _writer(model: MegatronModel, folder: Path, shard_bytes: int) -> Writer:
    if not model.as_published:
        return FolderWriter(folder, _promised(model), shard_bytes)
    writer: Writer = model.published.writer(folder, _promised(model), shard_bytes, model.arch, _config(model))
    return writer


class _Cast(TorchDistCheckpoint):
    """A checkpoint read in another dtype, but for what computes in fp32, which keeps its own."""

    def __init__(self, checkpoint: TorchDistCheckpoint, dtype: torch.dtype) -> None:
        vars(self).update(vars(checkpoint))
        self.dtypes = {key: own if key in IN_FP32 else dtype for key, own in checkpoint.dtypes.items()}
        self.nbytes = sum(math.prod(shape) * self.dtypes[key].itemsize for key, shape in self.shapes.items())

    def get(self, key: str, layer: int | None = None) -> Tensor:
        tensor, dtype = super().get(key, layer), self.dtypes[key]
        if tensor.abs().max() > torch.finfo(dtype).max:
            found, name = tensor.abs().max(), str(dtype).removeprefix("torch.")
            raise UserError(f"{key} of {self.folder} holds {found:g}, more than --dtype {name} can hold.")
        return tensor.to(dtype)


def _write_weights(
    model: MegatronModel, folder: Path, report: Report, text: proof.Text, dtype: torch.dtype | None,
    shard_bytes: int, expected: Logits | None,
) -> tuple[Sums, Tensor | None]:  # fmt: skip
    """Convert each tensor as the checkpoint's forward pass asks for it, or one after the other without a proof.

    Returns:
        Checksums of what was written, and the logits.
    """
    sums, logits, writer = Sums(), None, _writer(model, folder, shard_bytes)
    with Progress("exporting", model.checkpoint.nbytes, things="tensors") as progress:

        def convert(item: Item, tensors: list[Tensor]) -> None:
            parts = item.transform.split(model.merged(tensors), model.arch)
            where = item.key if item.layer is None else f"{item.key}[{item.layer}]"
            padding = model.arch.padded_vocab_size - model.arch.vocab_size
            cut = f" without {padding} padding rows" if padding and item.transform is VOCABULARY else ""
            status = "split" if len(parts) > 1 else "copied" if parts else "dropped"
            report.add(status, where, (", ".join(item.hf) or "a norm without weights") + cut)
            for name, part in zip(item.hf, parts, strict=True):
                if not torch.isfinite(part).all():
                    raise UserError(f"{where} of {model.checkpoint.folder} holds NaN or infinite values.")
                writer.add(name, part)
                sums.note(name, part)
                progress.advance(1, part.nbytes)

        tied = ("embedding.word_embeddings.weight",) if model.arch.tied else ()
        read = remembering(checkpoint_fetch(model.checkpoint), room_for_passes(model.plan.num_passes), tied)
        once = Once(((item, model.sources(item)) for item in model.items()), read, convert)
        if dtype is not None:
            logits = (expected or partial(proof.megatron_logits, model.arch, model.recursion, once, lora=model.lora))(
                text, dtype)
        once.finish()
    writer.close()
    return sums, logits


def _unrounded(model: MegatronModel, read: proof.Fetch, dtype: torch.dtype) -> proof.Fetch:
    """``read``, with the sums themselves, of weights and adapters, for what a 16-bit file holds their rounding of."""
    sums = {name: (item, place) for item in model.items() if len(model.sources(item)) > 1
            for place, name in enumerate(item.hf)}  # fmt: skip
    stored = checkpoint_fetch(model.checkpoint)

    def fetch(name: str) -> Tensor:
        written = read(name)
        if name not in sums or written.dtype.itemsize >= 4:
            return written
        item, place = sums[name]
        exact = model.merged([stored(each) for each in model.sources(item)], dtype=torch.float64)
        part = item.transform.split(exact, model.arch)[place]
        if not torch.equal(part.to(written.dtype), written):
            raise UserError(f"The proof failed: {name} is not the sum of its weight and adapters, rounded once.")
        return part.to(dtype)

    return fetch


def _prove(
    model: MegatronModel, folder: Path, report: Report, sums: Sums, logits: Tensor | None, text: proof.Text,
    dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """Everything reads back as written, and the folder's own model, plan and all, gives the checkpoint's logits."""
    source = open_source(str(folder))
    checked = sums.checked(source.get)
    summed = _unrounded(model, checked, torch.float32 if dtype is None else dtype)
    read = remembering(summed, room_for_passes(model.plan.num_passes), (EMBEDDING,) if source.arch.tied else ())
    if logits is not None and dtype is not None:
        source.get = read
        theirs = proof.hf_logits(source.family, source.config, source.weight, text, dtype)
        report.max_logit_error = proof.relative_error(logits, theirs)
        proof.check(report.max_logit_error, f"{model.checkpoint.folder} and its export")
    for name in [*sums.unread]:
        read(name)
    report.facts["bytes_read"] += source.bytes_read()
