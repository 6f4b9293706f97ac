"""Preprocessing against plain ``tokenizers.encode_batch`` on the same text, and two workers against one.

    python benchmarks/data.py

The text is what CPython ships (tools/build_corpus.py), several times over, with a BPE trained on it. Each round times,
in turn: encode_batch of all texts held in memory, in one thread; the pipeline from a .jsonl file to the parts of a
Megatron dataset (reading, parsing, tokenizing, writing) with one worker; and the same with two. Ratios are medians of
paired ones. The time of the pipeline runs from the begin of the first part to the end of the last: starting the
workers and joining the parts are left out. Needs two idle cores. Writes data.json and
data.md beside this file; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tokenizers import Tokenizer

from megatron_recursive.data.cpython_corpus import cpython_documents
from megatron_recursive.data.executors import build_executor
from megatron_recursive.data.sources import default_part_bytes, find_files, plan_parts
from megatron_recursive.data.steps import IndexedDatasetWriter, PartReader
from megatron_recursive.data.tokenizer import StoredTokenizer, TokenizerChoice, store_tokenizer
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.data.work_folder import WorkFolder

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """The text of the benchmark: how many times over, and tokens of the vocabulary."""

    copies: int = 8
    vocabulary: int = 16384


def write_corpus(folder: Path, size: Size) -> list[str]:
    """Write ``corpus.jsonl`` and a tokenizer; returns the texts."""
    texts = [document.text for document in cpython_documents()]
    once = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "once.jsonl").write_text(once, "utf-8")
    (folder / "corpus.jsonl").write_text(once * size.copies, "utf-8")
    train_tokenizer([folder / "once.jsonl"], folder / "tokenizer", size.vocabulary)
    return texts * size.copies


def encode_plainly(tokenizer: Tokenizer, texts: list[str]) -> tuple[float, int]:
    """Seconds and tokens of one encode_batch."""
    start = time.perf_counter()
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    return time.perf_counter() - start, tokens


def run_pipeline(corpus: Path, stored: StoredTokenizer, workers: int) -> tuple[float, int]:
    """Seconds and tokens of the pipeline's parts."""
    with tempfile.TemporaryDirectory() as folder:
        work = WorkFolder(Path(folder))
        files = find_files([corpus])
        parts = plan_parts(files, default_part_bytes(files))
        work.begin({}, lambda: parts)
        reader = PartReader(work, "text", "stop")
        steps = [reader, IndexedDatasetWriter(reader, stored, append_eod=False)]
        build_executor("local", steps, len(parts), workers, work.logs, {}).run()
        reports = [report for rank in range(len(parts)) if (report := work.report(rank)) is not None]
    finished = [report.finished for report in reports if report.finished is not None]
    assert len(finished) == len(parts)
    return max(finished) - min(report.started for report in reports), sum(report.tokens for report in reports)


def measure(size: Size, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_corpus(folder, size)
        stored = store_tokenizer(TokenizerChoice(str(folder / "tokenizer")), folder)
        tokenizer = Tokenizer.from_file(str(stored.file))
        rows = []
        for number in range(rounds + 1):
            plain, tokens = encode_plainly(tokenizer, texts)
            one, tokens_of_one = run_pipeline(folder / "corpus.jsonl", stored, workers=1)
            two, tokens_of_two = run_pipeline(folder / "corpus.jsonl", stored, workers=2)
            assert tokens == tokens_of_one == tokens_of_two
            if number:  # the first round warms up
                rows.append((plain, one, two))
                print(f"round {number}/{rounds}: plain {plain:.2f} s, one {one:.2f} s, two {two:.2f} s", flush=True)
    return {
        "tokens": tokens,
        "megabytes": sum(len(text.encode()) for text in texts) / 1e6,
        "plain_s": statistics.median(plain for plain, _, _ in rows),
        "one_worker_s": statistics.median(one for _, one, _ in rows),
        "two_workers_s": statistics.median(two for _, _, two in rows),
        "tokenize_ratio": statistics.median(plain / one for plain, one, _ in rows),
        "scaling_2": statistics.median(one / two for _, one, two in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time preprocessing against plain encode_batch, and two workers.")
    parser.add_argument("--rounds", type=int, default=5, help="paired runs (default: 5)")
    args = parser.parse_args()
    size = Size()
    measured = measure(size, args.rounds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    tokens = measured["tokens"]
    lines = [
        "# Preprocessing",
        "",
        f"`python benchmarks/data.py --rounds {args.rounds}` at commit {commit.strip()}: {size}, "
        f"{measured['megabytes']:.0f} MB of text, {tokens / 1e6:.1f} million tokens; medians. The pipeline reads "
        ".jsonl and writes Megatron's format; start of the workers and joining of the parts are left out.",
        "",
        "| | seconds | tokens/s per core | ratio |",
        "|---|---|---|---|",
        f"| `encode_batch`, one thread | {measured['plain_s']:.2f} | {tokens / measured['plain_s']:,.0f} | |",
        f"| pipeline, one worker | {measured['one_worker_s']:.2f} | {tokens / measured['one_worker_s']:,.0f} "
        f"| **{measured['tokenize_ratio']:.2f}** of `encode_batch` |",
        f"| pipeline, two workers | {measured['two_workers_s']:.2f} | {tokens / measured['two_workers_s'] / 2:,.0f} "
        f"| **{measured['scaling_2']:.2f}** times one worker |",
    ]
    print("\n".join(lines))
    summary = {key: round(measured[key], 3) for key in ("tokenize_ratio", "scaling_2")}
    (HERE / "data.md").write_text("\n".join([*lines, ""]))
    record = {**summary, "measured": measured, "size": asdict(size), "commit": commit.strip()}
    (HERE / "data.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
