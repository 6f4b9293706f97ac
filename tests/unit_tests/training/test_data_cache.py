"""The cached indices of a dataset answer to what the dataset holds, not to where it lies."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_recursive.data.preparation import Preparation
from tests.distributed import run_distributed
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
