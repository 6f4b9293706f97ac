"""Two pipeline stages against one at the same global batch: what the ring gains, and what simulation promises.

    python benchmarks/ring.py

Processes of one thread: one holds the whole model, two hold a stage each. Steps (forward and backward of all
micro-batches) alternate between the arms in one run; speed-ups are medians of paired ratios. Afterwards a second
process with a whole model tells what the machine takes: two steps that share nothing, at once against alone. Needs two
idle cores. Writes ring.json and ring.md beside this file; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VOCABULARY = 512
CONTROL_ROUNDS = 2


@dataclass(frozen=True)
class Size:
    """The model and batch of the benchmark."""

    layers: int = 4
    hidden: int = 512
    sequence: int = 256
    micro_batch: int = 1
    micro_batches: int = 8
    blocks: int = 3
    latents: int = 2


@dataclass(frozen=True)
class Arm:
    name: str
    detach: bool
    phases: str


ARMS = (Arm("full", False, "one"), Arm("detach, one phase", True, "one"), Arm("detach, two phases", True, "two"))


def worker(rank: int, world_size: int, store: str, size: Size, pipe: Connection) -> None:
    """One rank of an arm's model: answers an arm's name with the seconds of one step, and with those in messages."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    from megatron_recursive.backends import cpu

    cpu.install()
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, world_size), rank=rank,
                                         world_size=world_size)  # fmt: skip
    step = make_step(world_size, size)
    while (arm := pipe.recv()) is not None:
        torch.distributed.barrier()
        start = time.perf_counter()
        waited = step(arm)
        torch.distributed.barrier()
        pipe.send((time.perf_counter() - start, waited))


def make_step(stages: int, size: Size) -> Any:
    """Build a model per arm (the same weights in all) and return what runs one step of an arm."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_recursive.models.layer_specs import local_block_spec
    from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel, RecursiveTransformerConfig
    from megatron_recursive.pipeline import dispatch
    from megatron_recursive.plan import RecursionConfig

    parallel_state.initialize_model_parallel(1, stages)
    model_parallel_cuda_manual_seed(1)
    dispatch.install()
    models = {}
    for arm in ARMS:
        config = RecursiveTransformerConfig(
            num_layers=size.layers, hidden_size=size.hidden, num_attention_heads=4, ffn_hidden_size=4 * size.hidden,
            pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32, use_cpu_initialization=True,
            normalization="RMSNorm", add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
            gradient_accumulation_fusion=False, persist_layer_norm=False, masked_softmax_fusion=False,
            bias_dropout_fusion=False, deallocate_pipeline_outputs=True, pipeline_phases=arm.phases,
        )  # fmt: skip
        knobs = RecursionConfig(num_refinement_blocks=size.blocks, num_latent_refinements=size.latents,
                                detach_between_refinements=arm.detach, halt_supervision="last")  # fmt: skip
        model = RecursiveGPTModel(
            config, local_block_spec(config), VOCABULARY, size.sequence, position_embedding_type="rope",
            pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
            recursion=knobs.resolved(embedding_init_std=0.02),
        )  # fmt: skip
        models[arm.name] = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    tokens = torch.randint(0, VOCABULARY, (size.micro_batch, size.sequence + 1))
    positions = torch.arange(size.sequence).expand(size.micro_batch, -1)
    mask = torch.ones(size.micro_batch, size.sequence)

    def forward_step(_: Any, model: Any) -> Any:
        output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=mask)
        return output, lambda out: (out.objective_BS.sum(), mask.sum().to(torch.int), {})

    def step(name: str) -> float:
        models[name].zero_grad_buffer()
        with timed_messages() as waited:
            get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=None, model=[models[name]],
                num_microbatches=size.micro_batches, seq_length=size.sequence, micro_batch_size=size.micro_batch,
            )  # fmt: skip
        return waited[0]

    return step


class timed_messages:
    """Adds up the seconds that this rank spends waiting for point-to-point messages."""

    def __enter__(self) -> list[float]:
        import torch

        self.work, self.total = torch.distributed.Work, [0.0]
        self.wait = self.work.wait
        total, wait = self.total, self.wait

        def timed(work: Any, *args: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(work, *args)
            finally:
                total[0] += time.perf_counter() - start

        self.work.wait = timed
        return self.total

    def __exit__(self, *_: Any) -> None:
        self.work.wait = self.wait


def simulated(size: Size) -> dict[str, float]:
    """The speed-up of two stages that simulation promises for each arm."""
    from megatron_recursive.accounting import ModelShape
    from megatron_recursive.pipeline.pass_costs import price_passes
    from megatron_recursive.pipeline.timeline import simulate
    from megatron_recursive.plan import RecursionConfig, build_plan

    shape = ModelShape(num_layers=size.layers, hidden_size=size.hidden, ffn_hidden_size=4 * size.hidden,
                       num_attention_heads=4, num_query_groups=4, kv_channels=size.hidden // 4, vocab_size=VOCABULARY,
                       seq_length=size.sequence, linear_bias=False, norm_bias=False)  # fmt: skip
    speedups = {}
    for arm in ARMS:
        knobs = RecursionConfig(num_refinement_blocks=size.blocks, num_latent_refinements=size.latents,
                                detach_between_refinements=arm.detach, halt_supervision="last")  # fmt: skip
        plan = build_plan(knobs.resolved(embedding_init_std=0.02))
        costs = price_passes(plan, shape, [size.layers // 2] * 2)
        step = simulate(costs, size.micro_batches, windows=(size.micro_batches,) * (arm.phases == "two"))
        speedups[arm.name] = sum(costs.busy(size.micro_batches)) / step.makespan
    return speedups


def measure(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and speed-up of each arm, over rounds in which one stage and two stages take turns."""
    with tempfile.TemporaryDirectory() as folder:
        whole, ring = Team(1, f"{folder}/whole", size), Team(2, f"{folder}/ring", size)
        paired: dict[str, list[tuple[float, float, float]]] = {arm.name: [] for arm in ARMS}
        for number in range(rounds + 1):
            for arm in ARMS:
                one, _ = step([whole], arm)
                two, waited = step([ring], arm)
                if number:  # the first round warms up
                    paired[arm.name].append((one, two, waited))
                    print(f"round {number}/{rounds}, {arm.name}: {one:.2f} s, two stages {two:.2f} s", flush=True)
        ring.stop()
        other = Team(1, f"{folder}/other", size)
        at_once: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
        for number in range(CONTROL_ROUNDS + 1):
            for arm in ARMS:
                alone, _ = step([whole], arm)
                both, _ = step([whole, other], arm)
                if number:
                    at_once[arm.name].append(both / alone)
                    print(f"control {number}/{CONTROL_ROUNDS}, {arm.name}: {both / alone:.2f}", flush=True)
        whole.stop()
        other.stop()
    return {
        name: {
            "one_stage_s": statistics.median(one for one, _, _ in rows),
            "two_stages_s": statistics.median(two for _, two, _ in rows),
            "waiting_s": statistics.median(waited for _, _, waited in rows),
            "speedup": statistics.median(one / two for one, two, _ in rows),
            "slowdown_at_once": statistics.median(at_once[name]),
        }
        for name, rows in paired.items()
    }


class Team:
    """The processes that hold one model, a stage each."""

    def __init__(self, stages: int, store: str, size: Size):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(stages):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(rank, stages, store, size, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)


def step(teams: list[Team], arm: Arm) -> tuple[float, float]:
    """Run one step in every team at once; the longest time and the longest waiting of any rank, in seconds."""
    pipes = [pipe for team in teams for pipe in team.pipes]
    for pipe in pipes:
        pipe.send(arm.name)
    answers = [pipe.recv() for pipe in pipes]
    return max(seconds for seconds, _ in answers), max(waited for _, waited in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time two pipeline stages against one, and compare with simulation.")
    parser.add_argument("--rounds", type=int, default=7, help="paired steps of each arm (default: 7)")
    args = parser.parse_args()
    size = Size()
    promised, measured = simulated(size), measure(size, args.rounds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    lines = [
        "# The ring on two cores",
        "",
        f"`python benchmarks/ring.py --rounds {args.rounds}` at commit {commit.strip()}: {size}, one thread a rank; "
        "medians. Waiting: the longest time that a rank spends in point-to-point messages, bubbles included. At once: "
        "how much longer a step of one stage takes while an unrelated one runs on the other core, which no pipeline "
        "avoids. Share: the speed-up over the simulated one; in brackets, over what the cores leave of that.",
        "",
        "| plan | one stage | two stages | waiting | at once | speed-up | simulated | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in measured.items():
        times = " | ".join(f"{row[key]:.2f} s" for key in ("one_stage_s", "two_stages_s", "waiting_s"))
        share = row["speedup"] / promised[name]
        times += f" | {row['slowdown_at_once']:.2f}"
        shares = f"{share:.2f} ({share * row['slowdown_at_once']:.2f})"
        lines.append(f"| {name} | {times} | **{row['speedup']:.2f}** | {promised[name]:.2f} | {shares} |")
    print("\n".join(lines))
    best = max(ARMS[1:], key=lambda arm: measured[arm.name]["speedup"]).name
    summary = {
        "full_speedup": round(measured["full"]["speedup"], 3),
        "detach_speedup": round(measured[best]["speedup"], 3),
        "simulated_full": round(promised["full"], 3),
        "simulated_detach": round(promised[best], 3),
    }
    (HERE / "ring.md").write_text("\n".join([*lines, ""]))
    record = {**summary, "arms": measured, "simulated": promised, "commit": commit.strip()}
    (HERE / "ring.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
