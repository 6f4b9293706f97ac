"""Stands in for both programs that an ablation starts: tells what an arm costs, and trains in no time.

A run's held-out loss is lowest at --best-rate. From --cheap-until on a step costs twice as much. With --killed-once its
first start ends by a signal on its way, with --sleep it waits there; above --diverges-above it fails.
"""

import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path

from tests.unit_tests.plots.records import start, train, valid

parser = argparse.ArgumentParser()
for flag, kind in (("--lr", float), ("--seed", int), ("--train-iters", int), ("--save", Path), ("--num-layers", int),
                   ("--best-rate", float), ("--diverges-above", float), ("--blocks", int),
                   ("--hidden-size", int), ("--cheap-until", int)):  # fmt: skip
    parser.add_argument(flag, type=kind)
parser.add_argument("--killed-once", action="store_true")
parser.add_argument("--sleep", action="store_true")


def facts(flags: list[str]) -> dict:
    args, _ = parser.parse_known_args(flags)
    if args.num_layers is None:
        return {"error": "--num-layers missing."}
    if args.cheap_until and args.cheap_until > args.train_iters:
        return {"error": "--cheap-until ends behind the training."}
    blocks, dear = args.blocks or 0, 2 - args.cheap_until / args.train_iters if args.cheap_until else 1
    return {
        "iterations": args.train_iters, "tokens per iteration": 64, "tokens read per iteration": 64,
        "FLOPs per token": 1e3 * args.num_layers * (blocks * 3 or 1) * dear, "passes": 9,
        "plain": not blocks, "layers": args.num_layers, "width": args.hidden_size or 8, "parameters held": 99,
        "plan": "", "data": "", "donors": "", "stacks": {"core": (90, blocks or 1)},
        "evaluation iterations": 0 if "--eval-iters=0" in flags else 5,
    }  # fmt: skip


def run() -> None:
    args, _ = parser.parse_known_args()
    args.save.mkdir(parents=True, exist_ok=True)
    with open(args.save / "starts", "a") as starts:
        starts.write(json.dumps({"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"],
                                 "devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "argv": sys.argv[1:]}) + "\n")
    begun = (args.save / "metrics.jsonl").exists()
    half, blocks = args.train_iters // 2, args.blocks or 0
    with open(args.save / "metrics.jsonl", "a") as stream:
        def write(*records: dict) -> None:
            stream.write("".join(json.dumps(record) + "\n" for record in records))
            stream.flush()

        write(start(blocks=blocks, iteration=half if begun else 0, time=0.0), train(half, 5.0, time=1.0))
        if args.sleep and not begun:
            (args.save / "iter_0000001").mkdir()
            signal.pause()
        if args.killed_once and not begun:
            os.kill(os.getpid(), signal.SIGKILL)
        if args.diverges_above and args.lr > args.diverges_above:
            print("error: The loss is not a number; try a lower --lr.", file=sys.stderr)
            raise SystemExit(16)
        loss = 3 + math.log(args.lr / args.best_rate) ** 2 + 0.01 * (args.seed - 1) + (0 if blocks else 0.05)
        for iteration in (half, args.train_iters):
            (args.save / f"iter_{iteration:07d}").mkdir(exist_ok=True)
        (args.save / "run.json").write_text(json.dumps({"commit": {"hash": "abcdef1234", "changed": False}}))
        by_block = [loss + 0.1 * (blocks - block) for block in range(1, blocks + 1)] or [loss]
        write(valid(args.train_iters, *by_block, time=8.0, **({"token cosine": 0.25} if blocks else {})))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run()
    else:
        print(json.dumps({name: facts(each["flags"]) for name, each in json.load(sys.stdin).items()}))
