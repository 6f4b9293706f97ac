"""Conversations: preparation against plain ``tokenizers.encode_batch``, two workers against one, and how packing fills.

    python benchmarks/chat_data.py

The conversations are made of what CPython ships (tools/build_corpus.py): two to twelve turns, the user's of 30 to 600
characters or so, the assistant's five times as long, both log-normal, cut from its text. The tokenizer is a BPE trained
on it, with the default chat template. Each round times, in turn: encode_batch of all rendered conversations held in
memory, in one thread; the pipeline from a .jsonl file to the parts of a chat dataset (reading, parsing, rendering,
tokenizing, finding what is supervised, writing) with one worker; and the same with two. Ratios are medians of paired
ones; the time of the pipeline runs from the begin of the first part to the end of the last, as in data.py. The fill
rate is of sequences of 2,048 tokens, conversations longer than that left out. Needs two idle cores. Writes
chat_data.json and chat_data.md beside this file; the last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy
from tokenizers import Tokenizer

from megatron_recursive.data.chat.options import ChatOptions
from megatron_recursive.data.chat.packing import pack
from megatron_recursive.data.chat.steps import ChatWriter, ConversationReader
from megatron_recursive.data.chat.supervision import load_chat_encoder
from megatron_recursive.data.chat.templates import store_chat_tokenizer
from megatron_recursive.data.cpython_corpus import cpython_documents
from megatron_recursive.data.executors import build_executor
from megatron_recursive.data.indexed import read_lengths
from megatron_recursive.data.sources import default_part_bytes, find_files, plan_parts
from megatron_recursive.data.tokenizer import StoredTokenizer, TokenizerChoice
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.data.work_folder import WorkFolder

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """The conversations of the benchmark, tokens of the vocabulary, and tokens of a packed sequence."""

    conversations: int = 4_000
    vocabulary: int = 16384
    seq_length: int = 2048


def write_corpus(folder: Path, size: Size) -> list[list[dict[str, str]]]:
    """Write ``chats.jsonl`` and a tokenizer; returns the conversations."""
    texts = [document.text for document in cpython_documents()]
    (folder / "once.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    train_tokenizer([folder / "once.jsonl"], folder / "tokenizer", size.vocabulary)
    text, draws, at = "".join(texts), numpy.random.default_rng(0), 0
    conversations = []
    for _ in range(size.conversations):
        messages = []
        for turn in range(2 * min(1 + draws.geometric(0.5), 6)):
            length = int(draws.lognormal(numpy.log(600 if turn % 2 else 120), 0.8)) + 1
            at = at + length if at + 2 * length < len(text) else 0
            content = text[at : at + length].strip() or "Go on."
            messages.append({"role": "assistant" if turn % 2 else "user", "content": content})
        conversations.append(messages)
    lines = (json.dumps({"messages": messages}) + "\n" for messages in conversations)
    (folder / "chats.jsonl").write_text("".join(lines), "utf-8")
    return conversations


def encode_plainly(tokenizer: Tokenizer, texts: list[str]) -> tuple[float, int]:
    """Seconds and tokens of one encode_batch."""
    start = time.perf_counter()
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    return time.perf_counter() - start, tokens


def run_pipeline(corpus: Path, stored: StoredTokenizer, workers: int) -> tuple[float, int, list[int]]:
    """Seconds, tokens and lengths of the pipeline's parts."""
    with tempfile.TemporaryDirectory() as folder:
        work, files = WorkFolder(Path(folder)), find_files([corpus])
        parts = plan_parts(files, default_part_bytes(files))
        work.begin({}, lambda: parts)
        reader = ConversationReader(work, "stop", ChatOptions())
        build_executor("local", [reader, ChatWriter(reader, stored)], len(parts), workers, work.logs, {}).run()
        reports = [report for rank in range(len(parts)) if (report := work.report(rank)) is not None]
        lengths = [length for rank in range(len(parts)) for piece in read_lengths(work.part(rank).with_suffix(".idx"))
                   for length in piece.tolist()]  # fmt: skip
    finished = [report.finished for report in reports if report.finished is not None]
    assert len(finished) == len(parts)
    return max(finished) - min(report.started for report in reports), sum(r.tokens for r in reports), lengths


def measure(size: Size, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conversations = write_corpus(folder, size)
        (folder / "stored").mkdir()
        stored = store_chat_tokenizer(TokenizerChoice(str(folder / "tokenizer")), folder / "stored")
        template, tokenizer = load_chat_encoder(stored.file.parent)
        texts = [template.render(messages)[0] for messages in conversations]
        gc.freeze()  # the pipeline's one worker, this process, is not to walk what is held here for the benchmark
        rows = []
        for number in range(rounds + 1):
            plain, tokens = encode_plainly(tokenizer, texts)
            one, tokens_of_one, lengths = run_pipeline(folder / "chats.jsonl", stored, workers=1)
            two, tokens_of_two, _ = run_pipeline(folder / "chats.jsonl", stored, workers=2)
            assert tokens == tokens_of_one == tokens_of_two
            if number:  # the first round warms up
                rows.append((plain, one, two))
                print(f"round {number}/{rounds}: plain {plain:.2f} s, one {one:.2f} s, two {two:.2f} s", flush=True)
    fitting = [length for length in lengths if length <= size.seq_length]
    return {
        "tokens": tokens,
        "longer": len(lengths) - len(fitting),
        "plain_s": statistics.median(plain for plain, _, _ in rows),
        "one_worker_s": statistics.median(one for _, one, _ in rows),
        "two_workers_s": statistics.median(two for _, _, two in rows),
        "tokenize_ratio": statistics.median(plain / one for plain, one, _ in rows),
        "scaling_2": statistics.median(one / two for _, one, two in rows),
        "fill_rate": sum(fitting) / size.seq_length / len(pack(fitting, size.seq_length, seed=0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the preparation of conversations, and see how packing fills.")
    parser.add_argument("--rounds", type=int, default=5, help="paired runs (default: 5)")
    args = parser.parse_args()
    size, load = Size(), os.getloadavg()[0]
    measured = measure(size, args.rounds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    tokens, fill = measured["tokens"], measured["fill_rate"]
    lines = [
        "# Preparation of conversations",
        "",
        f"`python benchmarks/chat_data.py --rounds {args.rounds}` at commit {commit.strip()}: {size}, "
        f"{tokens / 1e6:.1f} million tokens; medians, at a load of {load:.1f} by others. The pipeline reads .jsonl, "
        "renders, finds what is supervised and writes a chat dataset; start of the workers and joining of the parts "
        "are left out.",
        "",
        "| | seconds | tokens/s per core | ratio |",
        "|---|---|---|---|",
        f"| `encode_batch` of the rendered text, one thread | {measured['plain_s']:.2f} "
        f"| {tokens / measured['plain_s']:,.0f} | |",
        f"| pipeline, one worker | {measured['one_worker_s']:.2f} | {tokens / measured['one_worker_s']:,.0f} "
        f"| **{measured['tokenize_ratio']:.2f}** of `encode_batch` |",
        f"| pipeline, two workers | {measured['two_workers_s']:.2f} | {tokens / measured['two_workers_s'] / 2:,.0f} "
        f"| **{measured['scaling_2']:.2f}** times one worker |",
        "",
        f"Packed into sequences of {size.seq_length:,} tokens, without the {measured['longer']:,} longer "
        f"conversations: **{fill:.1%}** full.",
    ]
    print("\n".join(lines))
    summary = {key: round(measured[key], 3) for key in ("tokenize_ratio", "scaling_2", "fill_rate")}
    (HERE / "chat_data.md").write_text("\n".join([*lines, ""]))
    record = {**summary, "measured": measured, "size": asdict(size), "load": load, "commit": commit.strip()}
    (HERE / "chat_data.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
