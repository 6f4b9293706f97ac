"""Verify: two models, each a Hugging Face folder or a Megatron checkpoint, tensor by tensor and by their logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf import proof
from megatron_recursive.hf.architecture import Architecture
from megatron_recursive.hf.convert import TOKENIZER, checkpoint_fetch, load_tokenizer
from megatron_recursive.hf.export import open_checkpoint
from megatron_recursive.hf.mappings import Item, items
from megatron_recursive.hf.report import Report
from megatron_recursive.hf.sources import open_source
from megatron_recursive.hf.torch_dist import LAYERS, TRACKER
from megatron_recursive.plan import RecursionConfig, RecursionPlan, build_plan

PLAIN = build_plan(RecursionConfig(enable_recursive_refinement=False).resolved(embedding_init_std=1.0))
VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Side:
    """A model of either kind, seen as Megatron's tensors without padding rows.

    Attributes:
        tensors: reads one tensor, by its key (a layer's with its number in brackets).
        logits: of the model's own class on tokens [1, S], as [S, true V].
    """

    name: str
    arch: Architecture
    plan: RecursionPlan
    tensors: dict[str, Callable[[], Tensor]]
    logits: Callable[[Tensor, torch.dtype], Tensor]
    tokenizer: Path


def verify(
    a: str, b: str, proof_dtype: torch.dtype | None = torch.float32, say: Callable[[str], None] = print
) -> Report:
    """Compare; the report's ``different`` counts tensors that both have with other values.

    ``copied`` are the equal ones, ``dropped`` those that only ``a`` has, ``new`` those that only ``b`` has. Logits are
    compared where both have the same vocabulary.
    """
    left, right = _open(a), _open(b)
    report, different = Report(), []
    for key, read in left.tensors.items():
        if key not in right.tensors:
            report.add("dropped", key, f"only in {a}")
        elif _equal(read(), right.tensors[key]()):
            report.add("copied", key, "equal")
        else:
            different.append(key)
    for key in right.tensors.keys() - left.tensors.keys():
        report.add("new", key, f"only in {b}")
    report.facts["different"] = len(different)
    report.facts["same_plan"] = left.plan == right.plan
    if proof_dtype is not None and left.arch.vocab_size == right.arch.vocab_size:
        positions = min(left.arch.max_positions, right.arch.max_positions)
        tokenizer = load_tokenizer(left.tokenizer) or load_tokenizer(right.tokenizer)
        tokens_BS = proof.proof_tokens(left.arch.vocab_size, tokenizer, positions)
        error = proof.relative_error(left.logits(tokens_BS, proof_dtype), right.logits(tokens_BS, proof_dtype))
        report.max_logit_error = error
    say(report.describe())
    for key in different[:6]:
        say(f"  different: {key}")
    if not report.facts["same_plan"]:
        say("  the recursion plans differ")
    return report


def agree(report: Report) -> bool:
    """Whether the two models are one: same tensors, plan and logits."""
    counts = report.counts()
    same = not (counts["dropped"] or counts["new"] or report.facts["different"]) and report.facts["same_plan"]
    return same and (report.max_logit_error is None or report.max_logit_error <= proof.TOLERANCE)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _open(given: str) -> Side:
    path = Path(given)
    if (path / TRACKER).is_file() or (path / ".metadata").is_file():
        return _open_megatron(given)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{given} is neither a Hugging Face folder (no config.json) nor a Megatron checkpoint.")
    return _open_hf(given)


def _name(key: str, layer: int | None) -> str:
    return key if layer is None else f"{LAYERS}{layer}.{key.removeprefix(LAYERS)}"


def _open_megatron(given: str) -> Side:
    model = open_checkpoint(given)
    rows = model.arch.vocab_size

    def reader(key: str, layer: int | None) -> Callable[[], Tensor]:
        return lambda: model.checkpoint.get(key, layer)[: rows if key in VOCABULARY_KEYS else None]

    tensors = {_name(item.key, item.layer): reader(item.key, item.layer) for item in model.items()}
    fetch = checkpoint_fetch(model.checkpoint)

    def logits(tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
        return proof.megatron_logits(model.arch, model.recursion, fetch, tokens_BS, dtype)

    folder = Path(given) / TOKENIZER
    place = folder if folder.is_dir() else model.checkpoint.folder.parent / TOKENIZER
    return Side(given, model.arch, model.plan, tensors, logits, place)


def _open_hf(given: str) -> Side:
    source = open_source(given)
    tensors = {}

    def reader(item: Item) -> Callable[[], Tensor]:
        def read() -> Tensor:
            merged = item.transform.merge([source.get(name) for name in item.hf], source.arch)
            return merged[: source.arch.vocab_size if item.key in VOCABULARY_KEYS else None]

        return read

    for item in items(source.family, source.arch, extra=source.extra_rows()):
        tensors[_name(item.key, item.layer)] = reader(item)
    ours = source.family.model_type == "recursive_gpt"
    plan = RecursionPlan.from_json(json.dumps(source.config.plan)) if ours else PLAIN

    def logits(tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
        return proof.hf_logits(source.family, source.config, source.weight, tokens_BS, dtype)

    return Side(given, source.arch, plan, tensors, logits, source.folder or Path(given))
