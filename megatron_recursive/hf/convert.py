"""Import: a Hugging Face model to a Megatron checkpoint, tensor by tensor, proven before it gets its name."""

from __future__ import annotations

import dataclasses
import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.command_line import command
from megatron_recursive.data.progress import Progress
from megatron_recursive.errors import UserError
from megatron_recursive.hf import proof
from megatron_recursive.hf.architecture import Architecture
from megatron_recursive.hf.files import copy_tokenizer, new_folder
from megatron_recursive.hf.mappings import FAMILIES, HALTING_ROWS, INITIAL_STATE_ROWS, Item, Row, items
from megatron_recursive.hf.report import Report
from megatron_recursive.hf.safetensors_files import DTYPES
from megatron_recursive.hf.sources import Source, choose_layers, open_source
from megatron_recursive.hf.torch_dist import LAYERS, TRACKER, TorchDistCheckpoint, TorchDistWriter
from megatron_recursive.models.checkpoint_integrity import write_manifest
from megatron_recursive.models.recursion_state import initial_state_vectors
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan

ARGUMENTS_FILE = "megatron_args.txt"
REPORT_FILE = "conversion.json"
TOKENIZER = "tokenizer"
RELEASE = "release"  # Megatron's name for weights without an iteration: a run that loads them starts at 0


@dataclass(frozen=True)
class ImportOptions:
    """What an import is asked to do.

    Attributes:
        recursion: knobs by name; the others are the source's own where it is a model of ours, or else the defaults.
        selection, num_layers, layers: which layers to keep (:func:`choose_layers`).
        untie: give the output head a copy of the embedding of its own.
        proof_dtype: float32 or float64; None skips the proof.
    """

    recursion: Mapping[str, Any] = field(default_factory=dict)
    selection: str | None = None
    num_layers: int | None = None
    layers: str | None = None
    untie: bool = False
    proof_dtype: torch.dtype | None = torch.float32


def import_model(hf: str, out: str, options: ImportOptions, say: Callable[[str], None] = print) -> Report:
    """Convert, prove, and put the checkpoint at ``out``.

    Raises:
        UserError: one sentence on what is wrong; nothing is left at ``out``.
    """
    source, target = open_source(hf), Path(out)
    layers = choose_layers(source.arch.num_layers, options.selection, options.num_layers, options.layers)
    untied = source.arch.tied and options.untie
    arch = dataclasses.replace(source.arch, num_layers=len(layers), tied=source.arch.tied and not options.untie)
    recursion = _recursion(source, options.recursion)
    plan = build_plan(recursion)
    job = _Import(source, arch, recursion, plan, layers, untied)
    say(f"{source.name}: {source.family.model_type}, {source.arch.num_layers} layers, {source.origin}, "
        f"{source.nbytes / 1e6:.1f} MB")  # fmt: skip
    with new_folder(target, job.nbytes()) as folder:
        report = job.write(folder)
        job.compare(folder)
        if options.proof_dtype is not None:
            report.max_logit_error = job.prove(folder, options.proof_dtype)
        (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        write_manifest(folder / RELEASE)
    say(report.describe())
    if options.proof_dtype is None:
        say("WARNING: the proof was skipped (--no-proof); nothing shows that the model computes what its donor does.")
    if (target / TOKENIZER).is_dir():
        prepare = ["preprocess", "--input", "DOCUMENTS", "--output", "DATA_PREFIX"]
        say(f"Prepare data for it with:\n{command(*prepare, '--tokenizer', str(target / TOKENIZER))}")
    else:
        say(f"WARNING: {source.name} has no tokenizer; give the run one with --tokenizer-type and --tokenizer-model.")
    say(f"{target}: the checkpoint. Train on with:\n{training_command(target, arch)}")
    return report


def _recursion(source: Source, given: Mapping[str, Any]) -> RecursionConfig:
    stored: dict[str, Any] = {}
    if source.family.model_type == "recursive_gpt":
        knobs = RecursionConfig.from_mapping(source.config.recursion)
        own = knobs.resolved(embedding_init_std=1.0, from_plain_gpt=True)
        if not given and build_plan(own) != RecursionPlan.from_json(json.dumps(source.config.plan)):
            raise UserError(f"{source.name} has a plan that its knobs do not give; import it with recursion flags.")
        stored = own.to_dict()
    recursion = RecursionConfig.from_mapping({**stored, **given})
    return recursion.resolved(embedding_init_std=source.arch.init_std, from_plain_gpt=True)


@dataclass
class _Import:
    source: Source
    arch: Architecture
    recursion: RecursionConfig
    plan: RecursionPlan
    layers: list[int]
    untied: bool

    # -- what is written -----------------------------------------------------------------------------------------

    def carried_rows(self) -> tuple[Row, ...]:
        """What the source's own recursion has and this plan wants too."""
        mine = recursive_rows(self.plan)
        return tuple(row for row in self.source.extra_rows() if row in mine)

    def items(self) -> Iterator[Item]:
        return items(self.source.family, self.arch, self.layers, self.carried_rows())

    def merged(self, item: Item) -> Tensor:
        parts = [self.source.get(self._stored_name(name)) for name in item.hf]
        for name, part in zip(item.hf, parts, strict=True):
            if not torch.isfinite(part).all():
                raise UserError(f"{self.source.name}: {name} holds NaN or infinite values; fetch the model again.")
            if part.dtype != parts[0].dtype:
                raise UserError(f"{self.source.name}: {', '.join(item.hf)} are merged but differ in dtype.")
        return item.transform.merge(parts, self.arch)

    def _stored_name(self, name: str) -> str:
        return "model.embed_tokens.weight" if self.untied and name == "lm_head.weight" else name

    def new_tensors(self) -> dict[str, Tensor]:
        """What the plan has and the source has not, as a fresh model starts it."""
        dtype = DTYPES[self.source.dtypes["model.norm.weight"]]
        fresh = {f"initial_{k}": v for k, v in initial_state_vectors(self.plan, self.arch.hidden_size).items()}
        if self.plan.has_halting:
            fresh["halting_head.weight"] = torch.zeros(self.arch.hidden_size)
            fresh["halting_head.bias"] = torch.full((1,), self.recursion.halt_bias)
        carried = {row.megatron for row in self.carried_rows()}
        return {key: tensor.to(dtype) for key, tensor in fresh.items() if key not in carried}

    def nbytes(self) -> int:
        """Bytes that will be written."""
        total = 0
        for item in self.items():
            stored = self.source.dtypes[self._stored_name(next(iter(item.hf)))]
            total += DTYPES[stored].itemsize * math.prod(item.megatron_shape(self.arch))
        return total

    # -- the steps -----------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> Report:
        report = Report(facts={"family": self.source.family.model_type, "layers": self.layers,
                               "source": self.source.origin})  # fmt: skip
        writer = TorchDistWriter(folder / RELEASE)
        try:
            with Progress("converting", self.nbytes(), things="tensors") as progress:
                for item in self.items():
                    tensor = self.merged(item)
                    writer.add(item.key, tensor, item.layer, self.arch.num_layers)
                    progress.advance(len(item.hf), tensor.nbytes)
                    self._account(report, item)
            for key, tensor in self.new_tensors().items():
                writer.add(key, tensor)
                report.add("new", key, "fresh, of the recursion")
            has_tokenizer = self._save_tokenizer(folder)
            writer.add_common(self._common(folder, has_tokenizer))
            writer.close()
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
        if any(name in row.hf for row in (*HALTING_ROWS, *INITIAL_STATE_ROWS)):
            return "this recursion has none"
        raise AssertionError(f"{name} is unaccounted for")

    def _save_tokenizer(self, folder: Path) -> bool:
        if self.source.folder is not None:
            return copy_tokenizer(self.source.folder, folder / TOKENIZER)
        if self.source.gguf is not None:
            return _save_gguf_tokenizer(self.source.gguf, self.source.config, folder / TOKENIZER)
        return False

    def _common(self, folder: Path, has_tokenizer: bool) -> dict[str, Any]:
        args = {**self.arch.to_megatron(), **self.recursion.to_dict(), "tensor_model_parallel_size": 1,
                "pipeline_model_parallel_size": 1, "use_dist_ckpt": True, "ckpt_format": "torch_dist",
                "consumed_train_samples": 0, "consumed_valid_samples": 0}  # fmt: skip
        if has_tokenizer:
            args.update(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(_final(folder) / TOKENIZER))
        return {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 0}

    def flags(self, has_tokenizer: bool, target: Path) -> list[str]:
        """A line a flag: architecture, recursion, tokenizer, and no dropout, with which donors are trained."""
        flags = [*self.arch.megatron_flags(), *self.recursion.flags()]
        if has_tokenizer:
            flags += ["--tokenizer-type=HuggingFaceTokenizer", f"--tokenizer-model={target / TOKENIZER}"]
        return [*flags, "--hidden-dropout=0.0", "--attention-dropout=0.0"]

    # -- the proof -----------------------------------------------------------------------------------------------

    def compare(self, folder: Path) -> None:
        """Every written tensor, read back, equals what its sources merge to."""
        checkpoint = TorchDistCheckpoint(folder / RELEASE)
        with Progress("comparing", checkpoint.nbytes, things="tensors") as progress:
            for item in self.items():
                tensor = self.merged(item)
                if not torch.equal(checkpoint.get(item.key, item.layer), tensor):
                    raise UserError(f"{item.key} reads back otherwise than it was written; check the disk of --out.")
                progress.advance(len(item.hf), tensor.nbytes)

    def prove(self, folder: Path, dtype: torch.dtype) -> float:
        """Recursion disabled, the checkpoint's logits are the donor's (of the chosen layers)."""
        checkpoint = TorchDistCheckpoint(folder / RELEASE)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        tokens_BS = proof.proof_tokens(self.arch.vocab_size, tokenizer, self.arch.max_positions)
        plain = RecursionConfig(enable_recursive_refinement=False).resolved(embedding_init_std=1.0)
        donor = proof.hf_logits(self.source.family, self._donor_config(), self._donor_weight, tokens_BS, dtype)
        ours = proof.megatron_logits(self.arch, plain, checkpoint_fetch(checkpoint), tokens_BS, dtype)
        error = proof.relative_error(donor, ours)
        proof.check(error, f"{self.source.name} and its conversion")
        return error

    def _donor_config(self) -> Any:
        """The donor's config with the chosen layers only, and for a model of ours without recursion."""
        values = self.source.config.to_dict()
        values["num_hidden_layers"] = len(self.layers)
        if self.source.family.model_type == "recursive_gpt":
            values.update(num_layers=len(self.layers), plan=None)
        if values.get("layer_types"):
            values["layer_types"] = [values["layer_types"][layer] for layer in self.layers]
        return type(self.source.config).from_dict(values)

    def _donor_weight(self, name: str) -> Tensor:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(self.layers[int(parts[2])])
        return self.source.weight(".".join(parts))


def recursive_rows(plan: RecursionPlan) -> tuple[Row, ...]:
    initial = not plan.is_plain and plan.state_init != "zeros"
    return (*(HALTING_ROWS if plan.has_halting else ()), *(INITIAL_STATE_ROWS if initial else ()))


def _final(partial: Path) -> Path:
    """The name that a folder being written will have."""
    return partial.with_name(partial.name.rpartition(".partial-")[0]).absolute()


def checkpoint_fetch(checkpoint: TorchDistCheckpoint) -> proof.Fetch:
    """Parameters by checkpoint key, those of layers with their number in it."""

    def fetch(name: str) -> Tensor:
        if not name.startswith(LAYERS):
            return checkpoint.get(name)
        layer, _, rest = name.removeprefix(LAYERS).partition(".")
        return checkpoint.get(LAYERS + rest, int(layer))

    return fetch


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; None where there is none that loads."""
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)  # AutoTokenizer may ask about code in the folder
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # whatever is wrong with it: the proof does without
        return None


def _save_gguf_tokenizer(path: Path, config: Any, folder: Path) -> bool:
    from transformers import AutoTokenizer, GenerationConfig

    try:
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
    except Exception:  # not every GGUF tokenizer is one that transformers can build
        return False
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    return True


def training_command(target: Path, arch: Architecture) -> str:
    """One line that trains on from the converted checkpoint, and resumes when it is given again."""
    length = min(1024, arch.max_positions)
    return command(
        "pretrain", "--nproc-per-node", "1", f"@{target / ARGUMENTS_FILE}",
        "--load", str(target), "--save", str(target), "--save-interval", "1000",
        "--seq-length", str(length), "--micro-batch-size", "1", "--global-batch-size", "8",
        "--train-iters", "1000", "--lr", "1e-4", "--data-path", "DATA_PREFIX",
        "--split", "90,10,0",
    )  # fmt: skip


__all__ = ["FAMILIES", "ImportOptions", "import_model"]
