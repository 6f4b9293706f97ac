"""Memory of preprocessing for each document: of the process that writes a part, and of the one that joins the parts.

    python benchmarks/data_memory.py

Synthetic documents of a word each go through the writer of a part, one million and ten million of them in one part;
then one part, and ten copies of it, are joined. Each is a process of its own, whose peak memory is read at its end; the
difference over nine million documents is the memory of one. Writes data_memory.json and data_memory.md beside this
file; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document

from megatron_recursive.data.joining import finish
from megatron_recursive.data.spans import Span
from megatron_recursive.data.steps import IndexedDatasetWriter, PartReader
from megatron_recursive.data.tokenizer import TokenizerChoice, store_tokenizer
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.data.work_folder import WorkFolder

HERE = Path(__file__).parent
BILLION = 10**9


class SyntheticReader(PartReader):
    """So many documents of a word, from nowhere."""

    def __init__(self, work: WorkFolder, documents: int) -> None:
        super().__init__(work, "text", "stop")
        self.documents = documents

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for number in range(self.documents):
            self.report.bytes += 8
            yield Document(f"word{number % 1000}", "")


def write(folder: Path, documents: int) -> None:
    """Write part 0."""
    work = WorkFolder(folder / "work")
    work.begin({"documents": documents}, lambda: [[Span("synthetic", 0, None, 8 * documents)]])
    stored = store_tokenizer(TokenizerChoice(str(folder / "tokenizer")), folder)
    reader = SyntheticReader(work, documents)
    IndexedDatasetWriter(reader, stored, append_eod=True).run(reader.run())


def join(folder: Path, parts: int) -> None:
    """Join copies of part 0."""
    made, work = WorkFolder(folder / "work"), WorkFolder(folder / f"join{parts}")
    work.begin({}, lambda: [[Span("synthetic", 0, None, 0)]] * parts)
    for rank in range(parts):
        for end in (".bin", ".idx", ".json"):
            target = work.part(rank).with_suffix(end)
            target.hardlink_to(made.part(0).with_suffix(end))
    stored = store_tokenizer(TokenizerChoice(str(folder / "tokenizer")), folder)
    finish(work, str(folder / "joined"), stored, join=True)


def measure(folder: Path, step: str, count: int) -> tuple[float, float]:
    """Peak bytes and seconds of a process that does a step."""
    command = [sys.executable, __file__, "--step", step, "--count", str(count), "--folder", str(folder)]
    start = time.monotonic()
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out.splitlines()[-1]), time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of preprocessing for each document.")
    parser.add_argument("--million", type=int, default=10**6, help="documents of the smaller case (default: 1000000)")
    parser.add_argument("--step", choices=["write", "join"], help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        {"write": write, "join": join}[args.step](args.folder, args.count)
        print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "words.txt").write_text("\n".join(f"word{number}" for number in range(1000)) * 3)
        train_tokenizer([folder / "words.txt"], folder / "tokenizer", 1000)
        rows = {}
        for step, counts in (("write", (10 * args.million, args.million)), ("join", (1, 10))):
            rows[step] = {}
            for count in counts:
                peak, seconds = measure(folder, step, count)
                documents = count if step == "write" else count * args.million
                rows[step][documents] = {"peak_bytes": peak, "seconds": round(seconds, 1)}
                print(f"{step} {documents:,} documents: peak {peak / 2**20:.0f} MiB, {seconds:.0f} s", flush=True)
    few, many = args.million, 10 * args.million
    slope = {step: (row[many]["peak_bytes"] - row[few]["peak_bytes"]) / (many - few) for step, row in rows.items()}
    lines = [
        "# Memory of preprocessing",
        "",
        f"`python benchmarks/data_memory.py`: peak memory of a process, {few:,} and {many:,} documents of a word each.",
        "",
        f"| | {few:,} | {many:,} | bytes for each document | at 10^9 in one process |",
        "|---|---|---|---|---|",
        *(f"| {what} | {rows[step][few]['peak_bytes'] / 2**20:.0f} MiB "
          f"| {rows[step][many]['peak_bytes'] / 2**20:.0f} MiB "
          f"| **{slope[step]:.2f}** | {slope[step] * BILLION / 2**30:.1f} GiB |"
          for step, what in (("write", "writing one part"), ("join", "joining"))),
    ]  # fmt: skip
    print("\n".join(lines))
    (HERE / "data_memory.md").write_text("\n".join([*lines, ""]))
    summary = {f"{step}_bytes_per_document": round(value, 3) for step, value in slope.items()}
    (HERE / "data_memory.json").write_text(json.dumps({**summary, "measured": rows}, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
