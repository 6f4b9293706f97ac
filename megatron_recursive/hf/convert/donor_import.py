"""Import: a Hugging Face model to a Megatron checkpoint, tensor by tensor, proven before it gets its name."""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.accounting import padded_rows
from megatron_recursive.command_line import command
from megatron_recursive.data.preparation import vocabulary_digest
from megatron_recursive.data.progress import Progress
from megatron_recursive.data.tokenizer import load_tokenizer
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert import proof
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.files import new_folder
from megatron_recursive.hf.convert.gguf_file import gguf_tokenizer
from megatron_recursive.hf.convert.hrm_text import PREFIXED
from megatron_recursive.hf.convert.mappings import (
    OWN,
    Item,
    Row,
    items,
    recursive_rows,
)
from megatron_recursive.hf.convert.model_card import donor_facts
from megatron_recursive.hf.convert.reading import Fetch, Once, Sums, remembering, room_for_passes
from megatron_recursive.hf.convert.report import REPORT_FILE, Report
from megatron_recursive.hf.convert.safetensors_files import DTYPES
from megatron_recursive.hf.convert.sources import Source, choose_layers, open_source, read_json
from megatron_recursive.hf.convert.stacks import StackChoice, ranges, stack_knobs
from megatron_recursive.hf.convert.tokenizer_files import (
    PROBES,
    also_turn_ends,
    copy_tokenizer,
    keep_class,
    last_id,
    prove_ids,
    token_ids,
    tokenizer_of,
    write_settings,
)
from megatron_recursive.hf.convert.torch_dist import DATA_FILE, LAYERS, TRACKER, TorchDistCheckpoint, TorchDistWriter
from megatron_recursive.hf.convert.transforms import VOCABULARY
from megatron_recursive.models.added_modules import fresh_tensors
from megatron_recursive.models.checkpoint_integrity import write_manifest
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plan.added_parameters import EVERY, added_parameters
from megatron_recursive.plan.knobs import flag_of
from megatron_recursive.plan.lora import MODULE as ADAPTERS
from megatron_recursive.plan.recursion_config import renewed, retrofit

ARGUMENTS_FILE = "megatron_args.txt"
TOKENIZER = "tokenizer"
EMBEDDING = "model.embed_tokens.weight"
PLAIN = RecursionConfig(enable_recursive_refinement=False).resolved(embedding_init_std=1.0)
DEPTHS = (1, 2, 4, 8)  # of a recurrent core, at which the loss is told
MUCH_WORSE = 1.0  # nats: the next token is e times less likely than to the donor
RELEASE = "release"  # Megatron's name for weights without an iteration: a run that loads them starts at 0


@dataclass(frozen=True)
class ImportOptions:
    """What an import is asked to do.

    Attributes:
        recursion: knobs by name; the others are the source's own where it is a model of ours, or else the defaults.
        selection, num_layers, layers: which layers to keep (:func:`choose_layers`).
        stacks: or which become prelude, core and coda.
        untie: give the output head a copy of the embedding of its own.
        resize_vocab: grow the embedding to the tokenizer's ids, or those of another tokenizer's folder, which has
            added to it and takes its place; new rows are the mean of the donor's.
        proof_dtype: float32 or float64; None skips the proof.
    """

    recursion: Mapping[str, Any] = field(default_factory=dict)
    selection: str | None = None
    num_layers: int | None = None
    layers: str | None = None
    untie: bool = False
    resize_vocab: bool | str = False
    proof_dtype: torch.dtype | None = torch.float32
    stacks: StackChoice = StackChoice()


def import_model(hf: str, out: str, options: ImportOptions, say: Callable[[str], None] = print) -> Report:
    """Convert, prove, and put the checkpoint at ``out``.

    Raises:
        UserError: one sentence on what is wrong; nothing is left at ``out``.
    """
    source, target = open_source(hf), Path(out)
    stacks, given = options.stacks.read(source.arch.num_layers), options.recursion
    layers = choose_layers(source.arch.num_layers, options.selection, options.num_layers, options.layers)
    if stacks is not None:
        if source.own_recursion is not None:
            raise UserError(f"{source.name} is recursive in itself, and imported whole; leave "
                            f"{options.stacks.flags()[0]} out.")  # fmt: skip
        if len(layers) < source.arch.num_layers or options.layers is not None:
            raise UserError(f"{options.stacks.flags()[0]} says which layers are kept; leave the other choices out.")
        layers, given = [layer for each in stacks.values() for layer in each], stack_knobs(stacks, given)
    if source.own_recursion is not None and layers != list(range(source.arch.num_layers)):
        raise UserError(f"{source.name} is recursive in itself, and imported whole; leave --layers, --num-layers and "
                        "--layer-selection out.")  # fmt: skip
    untied = source.arch.tied and options.untie
    arch = dataclasses.replace(source.arch, num_layers=len(layers), tied=source.arch.tied and not options.untie)
    tokenizer = donor_tokenizer(source)
    if options.resize_vocab:
        if tokenizer is None:
            raise UserError(f"--resize-vocab: {source.name} has no tokenizer that loads here; leave it out.")
        if isinstance(options.resize_vocab, str):
            tokenizer = _grown(tokenizer, options.resize_vocab, source)
        rows = max(arch.vocab_size, last_id(tokenizer) + 1)
        arch = dataclasses.replace(arch, vocab_size=rows, padded_vocab_size=padded_rows(rows))
    recursion = _recursion(source, given, len(layers))
    plan = build_plan(recursion)
    plan.layers_of(len(layers))
    job = _Import(source, arch, recursion, plan, layers, untied, tokenizer, options.proof_dtype)
    if isinstance(options.resize_vocab, str):
        job.tokenizer_folder = Path(options.resize_vocab)
    say(f"{source.name}: {source.family.model_type}, {source.arch.num_layers} layers, {source.origin}, "
        f"{source.nbytes / 1e6:.1f} MB")  # fmt: skip
    if not plan.is_plain:
        said = ", ".join(f"{name} {ranges(each)}" for name, each in job.stacks().items() if each)
        say(f"recursion: {plan.family}, layers {said}\n{plan.describe()}")
    if job.left_out():
        say(f"left out: layers {ranges(job.left_out())}")
    with new_folder(target, job.nbytes()) as folder:
        report = job.write(folder)
        report.facts.update(donor_facts(source.folder or source.gguf or Path(source.name)))
        notes = job.prove_tokenizer(folder)
        checkpoint = TorchDistCheckpoint(folder / RELEASE)
        notes += job.prove(checkpoint, report) + source.lost_with_recursion(plan)
        notes += [PREFIXED] if getattr(source.config, "prefix_lm", False) else []
        report.facts["bytes_read"] = source.bytes_read() + checkpoint.bytes_read
        (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        write_manifest(folder / RELEASE, {DATA_FILE: job.sha256})
    say(report.describe(str(target / REPORT_FILE)))
    if options.proof_dtype is None:
        notes.append("the proof was skipped (--no-proof); nothing shows that the model computes what its donor does.")
    if "loss" in report.facts:
        said = ", ".join(f"{name} {loss:.2f}" for name, loss in report.facts["loss"].items())
        say(f"loss on the text of the proof: {said}")
    for note in notes:
        say(f"WARNING: {note}")
    if (target / TOKENIZER).is_dir():
        prepare = ["preprocess", "--input", "DOCUMENTS", "--output", "DATA_PREFIX"]
        say(f"Prepare data for it with:\n{command(*prepare, '--tokenizer', str(target / TOKENIZER))}")
    else:
        say(f"WARNING: {source.name} has no tokenizer that can be taken from it; give the run one with "
            "--tokenizer-type and --tokenizer-model.")  # fmt: skip
    say(f"{target}: the checkpoint. Train on, beside it, with:\n{training_command(target)}")
    return report


def _recursion(source: Source, given: Mapping[str, Any], layers: int) -> RecursionConfig:
    """What is given, beside what the source has or, of a donor, what starts near to it (:func:`retrofit`)."""
    if (theirs := source.own_recursion) is not None:
        for name in ("recursion_family", "enable_recursive_refinement", "state_init"):
            if given.get(name, getattr(theirs, name)) != getattr(theirs, name):
                raise UserError(f"{source.name} is {theirs.recursion_family} in itself, with {flag_of(name)} "
                                f"{getattr(theirs, name)}; leave that flag out.")  # fmt: skip
        return RecursionConfig.from_mapping(renewed(theirs.to_dict(), given))
    recursion = RecursionConfig.from_mapping({**retrofit(given, layers), **given})
    if source.family.own_class:
        knobs = RecursionConfig.from_stored(source.config.recursion)
        own = knobs.resolved(embedding_init_std=1.0, from_plain_gpt=True)
        if not given and build_plan(own) != source.plan:
            raise UserError(f"{source.name} has a plan that its knobs do not give; import it with recursion flags.")
        same = "recursion_family" not in given or recursion.recursion_family == own.recursion_family
        recursion = RecursionConfig.from_mapping(renewed(own.to_dict(), given)) if same else recursion
    return recursion.resolved(embedding_init_std=source.arch.init_std, from_plain_gpt=True)


@dataclass
class _Import:
    source: Source
    arch: Architecture
    recursion: RecursionConfig
    plan: RecursionPlan
    layers: list[int]
    untied: bool
    tokenizer: Any
    proof_dtype: torch.dtype | None
    sums: Sums = field(default_factory=Sums)
    sha256: str = ""
    chosen: Tensor | None = None  # the donor's logits, of the chosen layers
    tokenizer_folder: Path | None = None  # of a tokenizer that takes the place of the donor's

    def __post_init__(self) -> None:
        source, recursive = self.source, self.source.family.own_class
        complete = self.layers == list(range(source.arch.num_layers))
        self.whole = complete and not recursive
        # A published recursion that is kept is proven too; our own was, when it was exported.
        self.kept = complete and recursive and source.family is not OWN and self.plan == source.plan
        read_twice = not self.whole and (self.kept or self.tokenizer is not None)
        passes = 1 if source.own_recursion is None else source.plan.num_passes
        again = 1 + source.plan.num_passes if read_twice else passes
        tied: dict[str, str] = {"lm_head.weight": EMBEDDING} if source.arch.tied else {}
        read = remembering(source.get, room_for_passes(again), [*tied.values()])
        self.read: Fetch = lambda name: read(tied.get(name, name))
        self.text = proof.proof_text(source.arch.vocab_size, self.tokenizer, self.arch.max_positions)

    def stacks(self) -> dict[str, list[int]]:
        """The donor's layers of each stack."""
        return {name: [self.layers[i] for i in held] for name, held in self.plan.layers_of(len(self.layers)).items()}

    def left_out(self) -> list[int]:
        return sorted({*range(self.source.arch.num_layers)} - {*self.layers})

    # -- what is written -----------------------------------------------------------------------------------------

    def carried_rows(self) -> tuple[Row, ...]:
        """What the source's own recursion has and this plan wants too."""
        mine = recursive_rows(self.plan)
        return tuple(row for row in self.source.extra_rows() if row.megatron in {each.megatron for each in mine})

    def items(self) -> Iterator[Item]:
        return items(self.source.family, self.arch, self.layers, self.carried_rows())

    def merged(self, item: Item, parts: list[Tensor]) -> Tensor:
        for name, part in zip(item.hf, parts, strict=True):
            if not torch.isfinite(part).all():
                raise UserError(f"{self.source.name}: {name} holds NaN or infinite values; fetch the model again.")
            if part.dtype != parts[0].dtype:
                raise UserError(f"{self.source.name}: {', '.join(item.hf)} are merged but differ in dtype.")
        merged, known = item.transform.merge(parts, self.arch), self.source.arch.vocab_size
        if item.transform is VOCABULARY and self.arch.vocab_size > known:
            merged[known : self.arch.vocab_size] = parts[0].float().mean(0)
        return merged

    def _stored_name(self, name: str) -> str:
        return EMBEDDING if self.untied and name == "lm_head.weight" else name

    def new_tensors(self) -> dict[str, Tensor]:
        """What the plan has and the source has not, as a fresh model starts it."""
        dtype = DTYPES[self.source.dtypes.get("model.norm.weight", self.source.dtypes[EMBEDDING])]
        fresh = fresh_tensors(added_parameters(self.plan), self.arch.hidden_size, self.recursion)
        carried = {item.key for item in self.items()}
        return {key: tensor.to(dtype) for key, tensor in fresh.items() if key not in carried}

    def nbytes(self) -> int:
        """Bytes that will be written."""
        total = 0
        for item in self.items():
            if not item.hf:
                continue
            stored = self.source.dtypes[self._stored_name(next(iter(item.hf)))]
            total += DTYPES[stored].itemsize * math.prod(item.megatron_shape(self.arch))
        return total

    # -- the steps -----------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> Report:
        """Convert each tensor as the donor's forward pass asks for it, or one after the other without a proof."""
        report = Report(facts={"family": self.source.family.model_type, "layers": self.layers,
                               "stacks": self.stacks(), "left_out": self.left_out(),
                               "source": self.source.origin})  # fmt: skip
        writer = TorchDistWriter(folder / RELEASE)
        try:
            with Progress("converting", self.nbytes(), things="tensors") as progress:

                def convert(item: Item, parts: list[Tensor]) -> None:
                    tensor = self.merged(item, parts)
                    writer.add(item.key, tensor, item.layer, self.arch.num_layers)
                    self.sums.note(item.name, tensor)
                    progress.advance(len(item.hf), tensor.nbytes)
                    self._account(report, item)

                once = Once(((item, [*item.hf]) for item in self.items()), self.read, convert)
                if self.proof_dtype is not None:
                    self.chosen = proof.hf_logits(self.source.family, self._donor_config(),
                                                  lambda name: once(self._donor_name(name)),
                                                  self.text, self.proof_dtype)  # fmt: skip
                once.finish()
            for item in (item for item in self.items() if not item.hf):
                ones = self.merged(item, []).to(DTYPES[self.source.dtypes[EMBEDDING]])
                writer.add(item.key, ones, item.layer, self.arch.num_layers)
                self.sums.note(item.name, ones)
                report.add("new", item.name, "a norm without weights: ones")
            for key, tensor in self.new_tensors().items():
                writer.add(key, tensor)
                self.sums.note(key, tensor)
                report.add("new", key, "fresh, of the recursion")
            has_tokenizer = self._save_tokenizer(folder)
            writer.add_common(self._common(folder, has_tokenizer))
            writer.close()
            self.sha256 = writer.sha256.hexdigest()
        finally:
            writer.abort()
        for name in self.source.shapes:
            if name not in report.lines:
                report.add("dropped", name, self.source.dropped.get(name) or self._why_dropped(name))
        (folder / TRACKER).write_text(RELEASE, encoding="utf-8")
        flags = self.flags(has_tokenizer, _final(folder))
        (folder / ARGUMENTS_FILE).write_text("\n".join(flags) + "\n", encoding="utf-8")
        return report

    def _account(self, report: Report, item: Item) -> None:
        where = item.key if item.layer is None else f"{item.key}[{item.layer}]"
        for name in item.hf:
            if self._stored_name(name) != name:
                report.add("new", item.key, "a copy of the embedding (--untie-embeddings)")
            else:
                report.add("merged" if len(item.hf) > 1 else "copied", name, where)

    def _why_dropped(self, name: str) -> str:
        if name.startswith("model.layers."):
            return "its layer was not chosen"
        if any(name in row.hf for row in self.source.extra_rows()):
            return "this recursion has none"
        raise AssertionError(f"{name} is unaccounted for")

    def _save_tokenizer(self, folder: Path) -> bool:
        target = folder / TOKENIZER
        if self.source.folder is not None:
            stated = read_json(self.source.folder / "config.json")
            if not copy_tokenizer(self.tokenizer_folder or self.source.folder, target):
                return False
        else:
            stated = self.source.config.to_dict()
            if self.tokenizer is None:  # not every GGUF tokenizer is one that transformers can build
                return False
            self.tokenizer.save_pretrained(target)
        keep_class(self.tokenizer, target)
        ids = token_ids(target, stated, self.arch.vocab_size)
        if self.tokenizer_folder is not None:
            ids["eos_token_id"] = also_turn_ends(ids["eos_token_id"], self.tokenizer)
        write_settings(target, ids)
        return True

    def _common(self, folder: Path, has_tokenizer: bool) -> dict[str, Any]:
        args = {**self.arch.to_megatron(), **self.recursion.to_dict(), "tensor_model_parallel_size": 1,
                "pipeline_model_parallel_size": 1, "use_dist_ckpt": True, "ckpt_format": "torch_dist",
                "consumed_train_samples": 0, "consumed_valid_samples": 0}  # fmt: skip
        if has_tokenizer:
            args.update(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(_final(folder) / TOKENIZER))
        return {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 0}

    def flags(self, has_tokenizer: bool, target: Path) -> list[str]:
        """A line a flag: architecture, recursion, tokenizer, stored dtype, a short schedule, and no dropout.

        Donors are trained without dropout. What the command line says after the file, holds instead.
        """
        flags = [*self.arch.megatron_flags(), *self.recursion.flags()]
        exact = {each.key for each in EVERY if each.in_fp32}
        dtypes = {self.source.dtypes[self._stored_name(name)] for item in self.items() if item.key not in exact
                  for name in item.hf}  # fmt: skip
        flags += ["--bf16"] if dtypes == {"BF16"} else ["--fp16"] if dtypes == {"F16"} else []
        if has_tokenizer:
            flags += ["--tokenizer-type=HuggingFaceTokenizer", f"--tokenizer-model={target / TOKENIZER}"]
        length = min(1024, self.arch.max_positions)
        return [*flags, "--hidden-dropout=0.0", "--attention-dropout=0.0", f"--seq-length={length}",
                "--micro-batch-size=1", "--global-batch-size=8", "--train-iters=1000", "--save-interval=1000",
                "--lr=1e-4", "--split=90,10,0"]  # fmt: skip

    # -- the proof -----------------------------------------------------------------------------------------------

    def prove_tokenizer(self, folder: Path) -> list[str]:
        """The ids of the stored tokenizer are the donor's; what there is to be warned of."""
        if not (folder / TOKENIZER).is_dir():
            return []
        unproven = prove_ids(self.tokenizer, folder / TOKENIZER, self.source.name)
        if unproven is not None:
            return [unproven]
        last = last_id(self.tokenizer)
        if last < self.arch.vocab_size:
            return []
        return [f"the tokenizer of {self.source.name} has ids up to {last}, but the model's vocabulary ends at "
                f"{self.arch.vocab_size - 1}; text with tokens between them cannot be trained on unless --resize-vocab "
                "grows the embedding."]  # fmt: skip

    def prove(self, checkpoint: TorchDistCheckpoint, report: Report) -> list[str]:
        """Everything reads back as written; recursion disabled (or as the donor's own is), the checkpoint's logits are
        the donor's (of the chosen layers); the losses are noted.

        Returns:
            What there is to be warned of.
        """
        tied = ("embedding.word_embeddings.weight",) if self.arch.tied else ()
        room = room_for_passes(self.plan.num_passes)
        fetch = remembering(self.sums.checked(checkpoint_fetch(checkpoint)), room, tied)
        notes = [] if self.chosen is None else self._compare_logits(fetch, self.chosen, report)
        for name in [*self.sums.unread]:
            fetch(name)
        return notes

    def _compare_logits(self, fetch: proof.Fetch, chosen: Tensor, report: Report) -> list[str]:
        assert self.proof_dtype is not None
        text, dtype, known = self.text, self.proof_dtype, self.source.arch.vocab_size
        own = self.source.own_recursion
        ours = proof.megatron_logits(self.arch, own or PLAIN, fetch, text, dtype)
        report.max_logit_error = proof.relative_error(chosen, ours[..., :known])
        proof.check(report.max_logit_error, f"{self.source.name} and its conversion")
        if self.tokenizer is None and not self.kept:  # there is no text to lose anything on
            return []
        donor = chosen if self.whole else proof.hf_logits(
            self.source.family, self.source.config, self.read, text, dtype)  # fmt: skip
        recursive = None
        if self.kept:
            recursive = proof.megatron_logits(self.arch, self.recursion, fetch, text, dtype)
            error = proof.relative_error(donor, recursive[..., :known])
            report.max_logit_error = max(report.max_logit_error, error)
            proof.check(error, f"{self.source.name} at {self.plan.num_passes} loops and its conversion")
        if self.tokenizer is None:
            return []
        losses = {"donor": donor, f"imported {'without' if own is None else 'with its own'} recursion": ours}
        for depth in DEPTHS if self.plan.has_inner_depth else ():
            deep = dataclasses.replace(self.recursion, num_recurrences=depth)
            losses[f"at r = {depth}"] = proof.megatron_logits(self.arch, deep, fetch, text, dtype)
        if not self.plan.is_plain and (own is None or self.plan != self.source.plan):
            if recursive is None:
                recursive = proof.megatron_logits(self.arch, self.recursion, fetch, text, dtype)
            losses["imported with recursion"] = recursive
        found = {name: round(proof.loss(logits, text), 4) for name, logits in losses.items()}
        report.facts["loss"] = found
        (name, last), before = list(found.items())[-1], found["donor"]
        if not last > before + MUCH_WORSE:
            return []
        why = "layers that were left out" if self.plan.is_plain else "passes that its layers were never trained for"
        return [f"{name}, the model starts at a loss of {last:.2f} where its donor has {before:.2f}: it must be "
                f"trained back from {why}; fewer of them start nearer to the donor."]  # fmt: skip

    def _donor_config(self) -> Any:
        """The donor's config with the chosen layers only, and for a model of ours without recursion."""
        if self.source.own_recursion is not None:  # which takes all layers
            return self.source.config
        values = self.source.config.to_dict()
        values["num_hidden_layers"] = len(self.layers)
        if self.source.family.own_class:
            values.update(num_layers=len(self.layers), plan=None)
        if values.get("layer_types"):
            values["layer_types"] = [values["layer_types"][layer] for layer in self.layers]
        return type(self.source.config).from_dict(values)

    def _donor_name(self, name: str) -> str:
        """A parameter of the chosen layers' model, as the donor calls it."""
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(self.layers[int(parts[2])])
        return ".".join(parts)


def donor_tokenizer(source: Source) -> Any:
    """As transformers loads it beside the donor's config.json; None where it does not load."""
    if source.gguf is not None:
        return gguf_tokenizer(source.gguf)
    return None if source.folder is None else tokenizer_of(source.folder)


def _grown(tokenizer: Any, folder: str, source: Source) -> Any:
    """The tokenizer of a folder, which has all ids of the donor's.

    Raises:
        UserError: it is another one.
    """
    grown, below = load_tokenizer(folder), last_id(tokenizer) + 1
    first, second = ((vocabulary_digest(each.get_vocab(), below), each([*PROBES])["input_ids"])
                     for each in (tokenizer, grown))  # fmt: skip
    if first != second:
        raise UserError(f"--resize-vocab {folder} is another tokenizer than {source.name}'s, and its ids mean other "
                        "tokens; name one that was made of it by adding tokens.")  # fmt: skip
    return grown


def _final(partial: Path) -> Path:
    """The name that a folder being written will have."""
    return partial.with_name(partial.name.rpartition(".partial-")[0]).absolute()


def checkpoint_fetch(checkpoint: TorchDistCheckpoint) -> proof.Fetch:
    """Parameters by checkpoint key, those of layers with their number in it."""

    def fetch(name: str) -> Tensor:
        if not name.startswith(LAYERS) or f".{ADAPTERS}." in name:  # whose keys have the layer's number in them
            return checkpoint.get(name)
        layer, _, rest = name.removeprefix(LAYERS).partition(".")
        return checkpoint.get(LAYERS + rest, int(layer))

    return fetch


def training_command(target: Path) -> str:
    """One line that trains on from the converted checkpoint; the rest is in its file of arguments."""
    run = target.with_name(f"{target.name}-trained")
    return command("pretrain", "--nproc-per-node", "1", f"@{target / ARGUMENTS_FILE}", "--load", str(target),
                   "--save", str(run), "--data-path", "DATA_PREFIX")  # fmt: skip


__all__ = ["ImportOptions", "import_model"]
