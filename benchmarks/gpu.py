"""Everything of this package that a GPU changes, measured in one command: bash benchmarks/gpu.sh [WHEELS_DIR].

Each part runs in a process of its own with a time limit, so that one that fails or hangs leaves the others. After each,
benchmarks/results/DEVICE.json is renewed; the last line on stdout is the same JSON. ``--device cpu --tiny`` rehearses
it on a machine without a GPU (memory, profile of kernels and MFU then mean nothing).

    python benchmarks/gpu.py                       all parts
    python benchmarks/gpu.py --parts parity speed  some
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUDGET = 530.0  # seconds for all parts

# The training command: a small recursive model on data that Megatron makes up.
FULL_RUN = ("--num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 512 --micro-batch-size 4 "
            "--global-batch-size 8 --vocab-size 1023").split()  # fmt: skip
TINY_RUN = ("--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 "
            "--global-batch-size 4 --vocab-size 127").split()  # fmt: skip
RUN = ("--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope --hidden-dropout 0 "
       "--attention-dropout 0 --mock-data --tokenizer-type NullTokenizer --lr 1e-3 --lr-decay-style constant "
       "--eval-iters 0 --log-interval 1 --split 90,5,5 --num-workers 0 --num-refinement-blocks 2 "
       "--num-latent-refinements 1").split()  # fmt: skip
IN_BF16 = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()


class Context:
    """What a part is given."""

    def __init__(self, device: str, tiny: bool, work: Path) -> None:
        self.device, self.tiny, self.work = device, tiny, work

    def run(self, *words: object) -> str:
        """A command of this package; its standard output."""
        command = [sys.executable, "-m", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
        if done.returncode:
            said = (done.stderr or done.stdout)[-1500:]
            for log in re.findall(r"the traceback is in (\S+?\.log)", said):
                said += Path(log).read_text()[-2500:]
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {said}")
        return done.stdout

    def train(self, folder: Path, iterations: int, *flags: object, device: str = "") -> list[float]:
        """The losses of a run of the training command, by iteration."""
        base = [*(TINY_RUN if self.tiny else FULL_RUN), *RUN, "--train-iters", iterations]
        length = base[base.index("--seq-length") + 1]
        self.run("megatron_recursive.pretrain", *base, "--max-position-embeddings", length, "--save", folder,
                 "--save-interval", iterations, "--device", device or self.device, *flags)  # fmt: skip
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [record["lm loss"] for record in records if record["kind"] == "train"]

    def checkpoint(self) -> Path:
        """A checkpoint of this part's own."""
        self.train(self.work / "checkpoint", 4)
        return self.work / "checkpoint"


def environment(context: Context) -> dict[str, Any]:
    import torch

    engine = importlib.util.find_spec("transformer_engine") is not None
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "transformer_engine": engine}
    if context.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory}
    return found


def attention(context: Context) -> dict[str, Any]:
    return in_process("attention", context)


def parity(context: Context) -> dict[str, Any]:
    """Losses and all gradients in fp32: this device against the CPU of the same machine."""
    import torch

    files = {device: context.work / f"{device}.pt" for device in dict.fromkeys(("cpu", context.device))}
    for device, file in files.items():
        subprocess.run([sys.executable, __file__, "--child", str(file), "--device", device,
                        *(["--tiny"] if context.tiny else [])], check=True, stdout=sys.stderr)  # fmt: skip
    expected, found = (torch.load(files[device], weights_only=True) for device in ("cpu", context.device))
    assert expected.keys() == found.keys()
    floor = 1e-4 * max(float(tensor.abs().max()) for tensor in expected.values())
    errors = {name: float((found[name] - there).abs().max()) / max(float(there.abs().max()), floor)
              for name, there in expected.items()}  # fmt: skip
    worst = max(errors, key=lambda name: errors[name])
    return {"tensors": len(errors), "worst": worst, "worst_relative_error": errors[worst],
            "losses": {name: float(t) for name, t in found.items() if name.endswith(" loss")},
            "ok": errors[worst] <= 1e-4}  # fmt: skip


def training(context: Context) -> dict[str, Any]:
    """bf16 with the distributed optimizer and both overlaps, at data-parallel size 1."""
    losses = context.train(context.work / "run", 10 if context.tiny else 40, *IN_BF16)
    return {"first_loss": losses[0], "last_loss": losses[-1], "ok": losses[-1] < losses[0]}


def control(context: Context) -> dict[str, Any]:
    """The same fp32 run on this device and, by --device cpu, on the CPU of the same machine."""
    context.train(context.work / "start", 1, device="cpu")  # from one seed each device draws other weights
    same = ("--finetune", "--load", context.work / "start")
    theirs = context.train(context.work / "cpu", 4, *same, device="cpu")
    mine = context.train(context.work / "device", 4, *same)
    error = max(abs(a - b) / b for a, b in zip(mine, theirs, strict=True))
    return {"losses": mine, "losses_on_cpu": theirs, "worst_relative_error": error, "ok": error <= 1e-4}


def speed(context: Context) -> dict[str, Any]:
    return in_process("speed", context)


def speed_engine(context: Context) -> dict[str, Any]:
    if importlib.util.find_spec("transformer_engine") is None or context.device == "cpu":
        return {"skipped": "Transformer Engine is not there"}
    return in_process("speed", context, engine=True)


def memory(context: Context) -> dict[str, Any]:
    return in_process("memory", context)


def profile(context: Context) -> dict[str, Any]:
    """A trace of one iteration, and the kernels that take longest in it."""
    context.train(context.work / "run", 6, *IN_BF16, "--profile", "--use-pytorch-profiler", "--profile-step-start", 3,
                  "--profile-step-end", 5)  # fmt: skip
    (trace,) = context.work.rglob("torch_profile/rank-0.json.gz")
    kernels: Counter[str] = Counter()
    with gzip.open(trace, "rt") as stream:
        for event in json.load(stream)["traceEvents"]:
            if event.get("cat") == "kernel":
                kernels[event["name"][:120]] += event["dur"]
    return {"trace_bytes": trace.stat().st_size, "microseconds_by_kernel": dict(kernels.most_common(12))}


def generate(context: Context) -> dict[str, Any]:
    """From a checkpoint, to the last block and with exits."""
    checkpoint, results = context.checkpoint(), {}
    for name, exits in (("all blocks", []), ("exits", ["--exit", "halting", "--halt-threshold", "0.005"])):
        begin = time.perf_counter()
        said = context.run("megatron_recursive", "generate", "--model", checkpoint, "--prompt", "1 2 3", "--max-tokens",
                           16, "--json", *exits)  # fmt: skip
        results[name] = {"seconds": time.perf_counter() - begin, "said": json.loads(said.splitlines()[-1])}
    return results


def convert(context: Context) -> dict[str, Any]:
    """To Hugging Face with its proof, and a comparison of the two."""
    checkpoint, out = context.checkpoint(), context.work / "exported"
    context.run("megatron_recursive", "convert", "export", "--ckpt", checkpoint, "--out", out)
    context.run("megatron_recursive", "convert", "verify", checkpoint, out)
    return {"files": sorted(file.name for file in out.iterdir())}


# Part -> the seconds that it may take; in the order of what one would miss most.
PARTS = {environment: 30, attention: 45, parity: 90, training: 80, control: 120, speed: 120, speed_engine: 120,
         memory: 80, profile: 60, generate: 80, convert: 120}  # fmt: skip


def in_process(name: str, context: Context, **options: Any) -> dict[str, Any]:
    from gpu_parts import models

    models.start(context.device)
    return getattr(models, name)(context.tiny, **options)


def run_part(name: str, limit: float, options: Sequence[str]) -> dict[str, Any]:
    """A part in a process group of its own, which is ended when its time is over."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as work, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, __file__, "--part", name, "--work", work, *options], text=True,
                                   stdout=subprocess.PIPE, stderr=errors, start_new_session=True)  # fmt: skip
        try:
            out, _ = process.communicate(timeout=limit)
            errors.seek(0)
            failed = errors.read()[-2000:] if process.returncode else ""
        except subprocess.TimeoutExpired:
            failed = f"not done after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.returncode is None:
                out, _ = process.communicate()
    found = [line for line in out.splitlines() if line.startswith("{")]  # a long part says what it has so far
    result = json.loads(found[-1]) if found else {}
    if failed or not found:
        result |= {"ok": False, "error": failed}
    return {"ok": True, **result, "wall_seconds": round(time.monotonic() - begin, 1)}


def run_all(names: Sequence[str], options: Sequence[str], out: Path, patience: float) -> bool:
    started, begin = time.strftime("%Y-%m-%dT%H:%M:%S"), time.monotonic()
    results: dict[str, Any] = before(names, options, out)
    record: dict[str, Any] = {"started": started, "commit": commit(), "options": list(options), "parts": results}
    limits = {part.__name__: limit for part, limit in PARTS.items()}
    for name in names:
        left = patience * BUDGET - (time.monotonic() - begin)
        results[name] = {"ok": False, "error": "not begun: the time for all parts is over"}
        if left > 5:
            results[name] = run_part(name, min(patience * limits[name], left), options)
        print(f"{name}: {'ok' if results[name]['ok'] else 'FAILED'} after {results[name].get('wall_seconds', 0)} s",
              file=sys.stderr, flush=True)  # fmt: skip
        device = results.get("environment", {}).get("device", "cpu" if "cpu" in options else "cuda")
        record |= {"device": device, "seconds": round(time.monotonic() - begin, 1)}
        write(out / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json", record)
    print(json.dumps(record))
    return all(result["ok"] for result in results.values())


def before(names: Sequence[str], options: Sequence[str], out: Path) -> dict[str, Any]:
    """The parts that this call leaves out and an earlier one of the same commit and options measured."""
    for file in out.glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.get("commit") and (record["commit"], record["options"]) == (commit(), list(options)):
            return {name: part for name, part in record["parts"].items() if name not in names}
    return {}


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def commit() -> str:
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    return ""


def main() -> None:
    names = [part.__name__ for part in PARTS]
    parser = argparse.ArgumentParser(description="Measure what a GPU changes, part by part.")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--patience", type=float, default=1.0, help="times the time that parts may take (default: 1)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of DEVICE.json")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        from gpu_parts import models

        models.start(args.device)
        models.parity_child(args.tiny, args.child)
    elif args.part is not None:
        (part,) = (part for part in PARTS if part.__name__ == args.part)
        result = part(Context(args.device, args.tiny, args.work))
        print(f"\n{json.dumps(result)}")
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part under way ends too
        options = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
        sys.exit(0 if run_all(args.parts, options, args.out, args.patience) else 1)


if __name__ == "__main__":  # checkpointing spawns helper processes, which import this file
    main()
