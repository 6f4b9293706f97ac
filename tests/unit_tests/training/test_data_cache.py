"""The cached indices of a dataset answer to what the dataset holds, not to where it lies."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.data.preparation import Preparation
from tests.distributed import run_distributed
from tests.unit_tests.inference.folders import write_tokenizer
from tests.unit_tests.training.runs import FLAGS, RECURSION
from tests.unit_tests.training.test_data_flags import DOCUMENT, EOD, parse

ON_DATA = [flag for flag in FLAGS if flag != "--mock-data"]


def write(prefix: Path, documents: int, first: int, length: int = DOCUMENT) -> None:
    """Documents of the ids from ``first`` to ``first`` + 9."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(127))
    for index in range(documents):
        builder.add_document(torch.tensor([first + index % 10] * (length - 1) + [EOD]), [length])
    builder.finalize(f"{prefix}.idx")


def samples_after_each_writing(folder: str, argv: list[str], contents: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """What a run would train on after each of several writings under one prefix, and the caches that are there."""
    from megatron_recursive.training.forward_step import datasets_provider
    from tests.models import start_parallel

    start_parallel()
    args, found = parse(argv), []
    for content in contents:
        for file in Path(folder).glob("data.*"):
            file.unlink()
        write(Path(folder, "data"), *content)
        train = datasets_provider([4 * args.train_iters, 0, 0])[0]
        tokens = {int(token) for index in range(len(train)) for token in train[index]["tokens"]} - {EOD}
        caches = sorted(str(file) for file in Path(folder).rglob("*document_index.npy"))
        found.append({"tokens": tokens, "samples": len(train), "caches": caches})
    return found


def test_data_written_again_under_the_same_prefix_is_read_anew(tmp_path: Path) -> None:
    """More documents, fewer (an IndexError once), longer ones, and the first again, whose cache is still there."""
    contents = [(60, 0), (200, 20), (8, 40), (60, 60, 3 * DOCUMENT), (60, 80)]
    for cache in ([], ["--data-cache-path", str(tmp_path / "cache")]):
        argv = [*ON_DATA, *RECURSION, "--data-path", str(tmp_path / "data"), *cache, "--split", "1"]
        write(tmp_path / "data", *contents[0])
        found = run_distributed(samples_after_each_writing, 1, str(tmp_path), argv, contents, timeout=120)[0]
        for (_, first, *_), each in zip(contents, found, strict=True):
            assert each["tokens"] == set(range(first, first + 10)) or first == 40, each
            assert first != 40 or each["tokens"] == set(range(40, 48))
        assert found[1]["samples"] > found[0]["samples"]
        assert found[4]["caches"] == found[3]["caches"]  # equal lengths: the same order of documents, whatever they say


def test_what_an_ablation_knows_data_by(tmp_path: Path) -> None:
    """Weights, a dataset's record or else its lengths, and a stream's files; nothing where no flag names data."""
    from megatron_recursive.data.content_keyed import data_of_run

    def said(**flags: Any) -> str:
        return data_of_run(argparse.Namespace(**flags))

    prefix, stream = str(tmp_path / "data"), tmp_path / "stream"
    write(tmp_path / "data", 2, 0)
    (tmp_path / "list").write_text(f"0.3 {prefix}\n")
    stream.mkdir()
    asked: list[dict[str, Any]] = [
        {"data_path": ["0.3", prefix]}, {"data_path": ["0.7", prefix]}, {"valid_chat_data": prefix},
        {"data_args_path": str(tmp_path / "list")}, {"data_stream": str(stream)},
    ]  # fmt: skip
    found = []
    for length in (3, 4, 5):
        write(tmp_path / "data", 2, 0, length)
        made = Preparation(9, "v", "t", f"source of {length}", 2, 2 * length, 0, 4 * length)
        if length == 5:
            (tmp_path / "data.idx.json").write_text(made.to_json())
        (stream / "0.parquet").write_bytes(bytes(length))
        found += [said(**each) for each in asked]
    write(tmp_path / "data", 2, 0, 5)
    (tmp_path / "data.idx.json").write_text(replace(made, source="another").to_json())
    found.append(said(**asked[0]))
    assert len({*found}) == len(found) == 16 and said(data_path=None, mock_data=True) == ""


def test_what_an_ablation_knows_donors_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The iteration that is read, by its manifest or files; a model's weights and config; the stream's tokenizer."""
    from megatron_recursive.training import donors

    monkeypatch.setattr(donors, "opened", lambda path: argparse.Namespace(folder=Path(path)))

    def said(**flags: Any) -> str:
        unsaid = dict.fromkeys(("init_from_gpt", "distill_from", "data_stream"))
        return donors.donors_of_run(argparse.Namespace(**(unsaid | flags)))

    root, model = tmp_path / "gpt", tmp_path / "model"
    for folder in (root / "iter_0000001", root / "iter_0000002", model):
        folder.mkdir(parents=True)
    tokens = {"data_stream": "texts", "tokenizer_model": str(tmp_path / "tok"),
              "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_hf_no_include_special_tokens": False}  # fmt: skip
    asked: list[dict[str, Any]] = [{"init_from_gpt": str(root)}, {"distill_from": str(model)},
                                   {"distill_from": str(model / "model.gguf")}, tokens]  # fmt: skip
    (model / "config.json").write_text("{}")
    found = []
    for iteration, date in ((1, 5), (2, 6), (2, 7)):
        (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        for file in (root / f"iter_000000{iteration}" / "0.distcp", model / "model.safetensors", model / "model.gguf"):
            file.write_text("weights")
            os.utime(file, (date, date))
        (model / "sweep.json").write_text(str(date))  # measurements that lie among them are none of the model
        write_tokenizer(tmp_path / "tok", eos=f"<|end{date}|>")
        found += [said(**each) for each in asked]
    manifest = root / "iter_0000002" / "integrity.json"
    for content in ("a", "b"):
        manifest.write_text(content)
        found.append(said(**asked[0]))
    os.utime(root / "iter_0000002" / "0.distcp", (8, 8))
    assert said(**asked[0]) == found[-1], "a copy"
    (model / "config.json").write_text('{"rope_theta": 1}')
    found.append(said(**asked[1]))
    assert len({*found}) == len(found) == 15 and said() == ""
