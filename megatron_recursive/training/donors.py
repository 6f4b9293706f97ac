"""What a run starts or learns from beside its data, known by its files: made again under its path it is another."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from megatron_recursive.data.preparation import digest
from megatron_recursive.models.checkpoint_integrity import MANIFEST
from megatron_recursive.training.checkpoint_folders import iteration_folder
from megatron_recursive.training.data_stream import is_stream, stored_tokenizer
from megatron_recursive.training.distillation import has_teacher, opened

WEIGHTS = (".distcp", ".pt", ".safetensors", ".gguf", ".npy")


def donors_of_run(args: argparse.Namespace) -> str:
    """The digest of what --init-from-gpt, --distill-from and the tokenizer of --data-stream are; "" without them."""
    found: dict[str, Any] = {}
    if args.init_from_gpt is not None:
        found["init_from_gpt"] = _files(iteration_folder(Path(args.init_from_gpt), "--init-from-gpt"))
    if has_teacher(args):
        found["distill_from"] = _files(opened(args.distill_from).folder)
    if is_stream(args):
        with tempfile.TemporaryDirectory() as folder:
            found["data_stream"] = stored_tokenizer(args, Path(folder)).digest
    return digest(found) if found else ""


def _files(place: Path | None) -> list[Any]:
    """Of an iteration's folder its manifest; else a model's config.json, and sizes and dates of the weights."""
    assert place is not None
    if (place / MANIFEST).is_file():
        return [place.name, (place / MANIFEST).read_text("utf-8")]
    files = [place] if place.is_file() else sorted(place.iterdir())
    stats = [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in files if each.suffix in WEIGHTS]
    config = place / "config.json"
    return [stats, config.read_text("utf-8") if config.is_file() else ""]
