"""Run the benchmarks that need no GPU, keep their figures with command and commit, and render them.

    python benchmarks/bench.py              all of them, half an hour on two idle cores
    python benchmarks/bench.py ring data    some
    python benchmarks/bench.py --render     none: only render the documents anew

Each benchmark is a process of its own, which writes NAME.json; the figures that FIGURES names are then appended to
results/MACHINE.json. The README.md beside this file shows all of them over time; that of the repository has tables of
the newest ones in the file that the mark above the tables names. A benchmark that fails leaves the others; then what it
said last ends the output, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
SHOWN = re.compile(r"(<!-- figures of benchmarks/results/(?P<file>[\w.-]+): .*? -->\n).*?(?=<!-- end of figures -->)",
                   re.DOTALL)  # fmt: skip

# Benchmark -> what is kept of its JSON (keys joined by dots), and the columns' names.
FIGURES = {
    "ring": {"full_speedup": "full gradient", "simulated_full": "simulated",
             "detach_speedup": "detached", "simulated_detach": "simulated"},
    "step_time": {"full_time_ratio": "time, full gradient", "arms.full.flops_ratio": "FLOPs",
                  "arms.full.memory_ratio": "activations", "detach_time_ratio": "time, detached",
                  "detach_flops_ratio": "FLOPs", "detach_memory_ratio": "activations"},
    "generate": {"cache_speedup": "cached", "vs_plain_ratio": "for Llama", "batch_8.speedup": "exits together",
                 "batch_8.predicted": "by FLOPs", "batch_8.mean_decoded_blocks": "blocks",
                 "batch_8_mixed.speedup": "exits apart", "batch_8_mixed.predicted": "by FLOPs"},
    "data": {"tokenize_ratio": "rate, of encode_batch", "scaling_2": "two workers for one"},
    "chat_data": {"tokenize_ratio": "rate, of encode_batch", "scaling_2": "two workers for one",
                  "fill_rate": "packed sequences, full"},
    "data_memory": {"write_bytes_per_document": "bytes a document, writing",
                    "join_bytes_per_document": "bytes a document, joining"},
}  # fmt: skip

TABLES = """\
Ratios measured in one run each, on {machine} ([over time, and other benchmarks](benchmarks/README.md)), by
{commands}.
Training, against a plain GPT of the unrolled depth:

| gradient through | time | FLOPs | activations |
|---|---|---|---|
| all passes | {step_time[full_time_ratio]:.2f} | {step_time[arms.full.flops_ratio]:.2f} \
| {step_time[arms.full.memory_ratio]:.2f} |
| the last of three blocks | {step_time[detach_time_ratio]:.2f} | {step_time[detach_flops_ratio]:.2f} \
| {step_time[detach_memory_ratio]:.2f} |

Speed-ups:

| what | times as fast | by FLOPs or simulation |
|---|---|---|
| two pipeline stages for one, full gradient | {ring[full_speedup]:.2f} | {ring[simulated_full]:.2f} |
| two pipeline stages for one, detached | {ring[detach_speedup]:.2f} | {ring[simulated_detach]:.2f} |
| cached generation to 256 tokens for uncached | {generate[cache_speedup]:.1f} | |
| exits after {generate[batch_8.mean_decoded_blocks]:.1f} of 4 blocks, a batch leaving together \
| {generate[batch_8.speedup]:.2f} | {generate[batch_8.predicted]:.2f} |
| the same, 8 sequences each leaving on its own | {generate[batch_8_mixed.speedup]:.2f} \
| {generate[batch_8_mixed.predicted]:.2f} |
| our Hugging Face model for transformers' Llama of the unrolled depth | {generate[vs_plain_ratio]:.2f} | 1 |
"""


def machine() -> str:
    """The processor's model and the cores that this process may use: nothing that tells whose machine it is."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    model = re.sub(r"\((?:R|TM)\)| CPU| @.*| Processor", "", found[1]) if found else platform.machine()
    return f"{' '.join(model.split())}, {len(os.sched_getaffinity(0))} CPU cores"


def results_file() -> Path:
    return HERE / "results" / f"{re.sub(r'[^a-z0-9]+', '-', machine().lower()).strip('-')}.json"


def commit() -> str:
    """The commit that is measured, "-dirty" where files differ from it; asked before benchmarks write their files."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip() or "unknown"


def figures_of(name: str, record: dict[str, Any]) -> dict[str, float]:
    figures = {}
    for key in FIGURES[name]:
        value: Any = record
        for word in key.split("."):
            value = value[word]
        figures[key] = round(value, 4)
    return figures


def run(name: str, measured: str) -> str:
    """Run a benchmark and append its figures; what it said last if it failed."""
    process = subprocess.Popen([sys.executable, str(HERE / f"{name}.py")], cwd=HERE.parent, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    last: deque[str] = deque(maxlen=30)
    for line in process.stdout or ():
        print(line, end="", flush=True)
        last.append(line)
    if process.wait():
        return f"exit status {process.returncode}\n{''.join(last)}"
    try:
        figures = figures_of(name, json.loads((HERE / f"{name}.json").read_text()))
    except KeyError as error:
        return f"{name}.json has no {error}, which FIGURES in bench.py names\n"
    path = results_file()
    kept = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "runs": []}
    kept["runs"].append({"benchmark": name, "command": f"python benchmarks/{name}.py", "commit": measured,
                         "recorded": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()), "figures": figures})  # fmt: skip
    write(path, json.dumps(kept, indent=1) + "\n")
    return ""


def all_runs() -> list[dict[str, Any]]:
    """The runs of all machines by time, each with its machine; the records of benchmarks/gpu.py hold none."""
    kept = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    runs = [{**run, "machine": file["machine"]} for file in kept for run in file.get("runs", [])]
    return sorted(runs, key=lambda run: run["recorded"])


def history() -> str:
    """The README.md beside this file: every figure over time."""
    ablations = ", ".join(f"[{path.stem}]({path.name})" for path in sorted(HERE.glob("*.md"))
                          if path.with_suffix(".yaml").exists())  # fmt: skip
    lines = ["# Benchmarks", "", "<!-- rendered by python benchmarks/bench.py --render -->", "",
             "`make bench` runs these on an idle machine and adds a line to each table; commands are in `results/`. "
             "What a GPU showed: [results](results/README.md). Ablations, which `make bench` leaves out: "
             f"{ablations}."]  # fmt: skip
    for name, columns in FIGURES.items():
        said = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
        lines += ["", f"## {name}", "", said.split("\n")[0], f"In full, the last run: [{name}.md]({name}.md).", ""]
        rows = [["recorded", "commit", "machine", *columns.values()], ["---"] * (len(columns) + 3)]
        for found in (found for found in all_runs() if found["benchmark"] == name):
            cells = [f"{found['figures'][key]:.3f}" if key in found["figures"] else "" for key in columns]
            rows.append([found["recorded"], found["commit"], found["machine"], *cells])
        lines += [f"| {' | '.join(row)} |" for row in rows] if rows[2:] else ["No run is kept yet."]
    return "\n".join([*lines, ""])


def readme(text: str) -> str:
    """The repository's README with the tables that its mark asks for."""

    def tables(found: re.Match[str]) -> str:
        kept = json.loads((HERE / "results" / found["file"]).read_text())
        newest = {run["benchmark"]: run for run in sorted(kept["runs"], key=lambda run: run["recorded"])}
        commands = ", ".join(f"`{name}.py` at {newest[name]['commit']}" for name in newest if f"{{{name}[" in TABLES)
        try:
            shown = TABLES.format(machine=kept["machine"], commands=commands,
                                  **{name: run["figures"] for name, run in newest.items()})  # fmt: skip
        except KeyError as error:
            sys.exit(f"benchmarks/results/{found['file']} lacks {error}: name another file in README.md, or run it.")
        return f"{found[1]}{shown}"

    return SHOWN.sub(tables, text)


def write(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the benchmarks that need no GPU, and render their figures.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--render", action="store_true", help="run nothing; renew benchmarks/README.md and README.md")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in FIGURES]:
        parser.error(f"no benchmark is named {', '.join(unknown)}; there are {', '.join(FIGURES)}.")
    measured, failed = commit(), []
    if not args.render and (load := os.getloadavg()[0]) > 0.5:
        print(f"Others use this machine (load {load:.1f}): do not keep these times.", file=sys.stderr)
    try:
        for name in [] if args.render else args.names or FIGURES:
            print(f"== {name}", flush=True)
            if said := run(name, measured):
                failed.append(f"{name} failed: {said}")
    finally:  # interrupted too
        write(HERE / "README.md", history())
        write(README, readme(README.read_text()))
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
