"""Verify: two models, each a Hugging Face folder or a Megatron checkpoint, tensor by tensor and by their logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert import proof
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.donor_import import EMBEDDING, TOKENIZER, checkpoint_fetch
from megatron_recursive.hf.convert.export import open_checkpoint
from megatron_recursive.hf.convert.mappings import Item, items
from megatron_recursive.hf.convert.report import Report, few
from megatron_recursive.hf.convert.safetensors_files import DTYPES
from megatron_recursive.hf.convert.sources import open_source
from megatron_recursive.hf.convert.tokenizer_files import tokenizer_of
from megatron_recursive.hf.convert.torch_dist import TRACKER
from megatron_recursive.hf.convert.transforms import VOCABULARY
from megatron_recursive.plan import RecursionPlan


@dataclass(frozen=True)
class Side:
    """A model of either kind, seen as Megatron's tensors without padding rows.

    Attributes:
        tensors: reads one tensor, by its key (a layer's with its number in brackets).
        logits: of the model's own class on the text, computed in a dtype, as [3, S, true V]; with another dtype, of
            weights rounded to it.
        dtypes: of the tensors by key, those of all layers under one.
        args: of a Megatron checkpoint.
    """

    name: str
    arch: Architecture
    plan: RecursionPlan
    tensors: dict[str, Callable[[], Tensor]]
    logits: Callable[[proof.Text, torch.dtype, torch.dtype | None], Tensor]
    tokenizer: Path
    dtypes: Mapping[str, torch.dtype]
    args: dict[str, Any]


def verify(
    a: str, b: str, proof_dtype: torch.dtype | None = torch.float32, say: Callable[[str], None] = print
) -> Report:
    """Compare; the report's ``different`` counts tensors that both have with other values.

    ``copied`` are the equal ones, ``dropped`` those that only ``a`` has, ``new`` those that only ``b`` has. Tensors of
    two dtypes are compared at the coarser one, and so are then the logits. Logits are compared where both have the same
    vocabulary.
    """
    left, right = open_side(a), open_side(b)
    report, different = Report(), []
    pairs: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for key, read in left.tensors.items():
        if key not in right.tensors:
            report.add("dropped", key, f"only in {a}")
            continue
        mine, other = read(), right.tensors[key]()
        if mine.dtype != other.dtype:
            pairs[mine.dtype, other.dtype] = pairs.get((mine.dtype, other.dtype), 0) + 1
            mine, other = (each.to(_coarser(mine.dtype, other.dtype)) for each in (mine, other))
        if torch.equal(mine, other):
            report.add("copied", key, "equal")
        else:
            different.append(key)
    for key in right.tensors.keys() - left.tensors.keys():
        report.add("new", key, f"only in {b}")
    report.facts["different"] = len(different)
    report.facts["same_plan"] = left.plan == right.plan
    if proof_dtype is not None and left.arch.vocab_size == right.arch.vocab_size:
        positions = min(left.arch.max_positions, right.arch.max_positions)
        tokenizer = tokenizer_of(left.tokenizer) or tokenizer_of(right.tokenizer)
        text = proof.proof_text(left.arch.vocab_size, tokenizer, positions)
        coarse = functools.reduce(_coarser, (dtype for pair in pairs for dtype in pair)) if pairs else None
        error = proof.relative_error(*(side.logits(text, proof_dtype, coarse) for side in (left, right)))
        report.max_logit_error = error
    for (mine_dtype, other_dtype), count in pairs.items():
        say(f"{count} tensors are {_said(mine_dtype)} in {a} and {_said(other_dtype)} in {b}; they are compared at "
            f"{_said(_coarser(mine_dtype, other_dtype))}")  # fmt: skip
    say(report.describe() if report.lines or not different else f"no tensor is equal, {len(different)} differ")
    for line in few("different", different):
        say(line)
    if not report.facts["same_plan"]:
        say("  the recursion plans differ")
    return report


def agree(report: Report) -> bool:
    """Whether the two models are one: same tensors, plan and logits."""
    counts = report.counts()
    same = not (counts["dropped"] or counts["new"] or report.facts["different"]) and report.facts["same_plan"]
    return same and (report.max_logit_error is None or report.max_logit_error <= proof.TOLERANCE)


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The one with fewer digits."""
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounded(fetch: proof.Fetch, dtype: torch.dtype | None) -> proof.Fetch:
    return fetch if dtype is None else lambda name: fetch(name).to(dtype)


def open_side(given: str) -> Side:
    """Open a model of either kind.

    Raises:
        UserError: what is wrong with it, in one sentence.
    """
    path = Path(given)
    if (path / TRACKER).is_file() or (path / ".metadata").is_file():
        return _open_megatron(given)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{given} is neither a Hugging Face folder (no config.json) nor a Megatron checkpoint.")
    return _open_hf(given)


def _open_megatron(given: str) -> Side:
    model = open_checkpoint(given)
    rows = model.arch.vocab_size

    fetch = checkpoint_fetch(model.checkpoint)

    def reader(item: Item) -> Callable[[], Tensor]:
        rows_read = rows if item.transform is VOCABULARY else None
        return lambda: model.merged([fetch(name) for name in model.sources(item)])[:rows_read]

    tensors = {item.name: reader(item) for item in model.items()}

    def logits(text: proof.Text, dtype: torch.dtype, coarse: torch.dtype | None) -> Tensor:
        return proof.megatron_logits(model.arch, model.recursion, _rounded(fetch, coarse), text, dtype, model.lora)

    folder = Path(given) / TOKENIZER
    place = folder if folder.is_dir() else model.checkpoint.folder.parent / TOKENIZER
    return Side(given, model.arch, model.plan, tensors, logits, place, model.checkpoint.dtypes, model.args)


def _open_hf(given: str) -> Side:
    source = open_source(given)
    tensors = {}

    def reader(item: Item) -> Callable[[], Tensor]:
        def read() -> Tensor:
            merged = item.transform.merge([source.get(name) for name in item.hf], source.arch)
            return merged[: source.arch.vocab_size if item.transform is VOCABULARY else None].to(dtypes[item.key])

        return read

    dtypes: dict[str, torch.dtype] = {}
    for item in items(source.family, source.arch, extra=source.extra_rows()):
        tensors[item.name] = reader(item)
        dtypes[item.key] = DTYPES[source.dtypes[next(iter(item.hf), EMBEDDING)]]  # a norm without weights has no name

    def logits(text: proof.Text, dtype: torch.dtype, coarse: torch.dtype | None) -> Tensor:
        return proof.hf_logits(source.family, source.config, _rounded(source.weight, coarse), text, dtype)

    return Side(given, source.arch, source.plan, tensors, logits, source.folder or Path(given), dtypes, {})
