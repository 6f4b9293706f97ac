"""A training step of the recursive model against Megatron's plain GPT of the same unrolled depth.

    python benchmarks/step_time.py

V passes of L layers against V * L layers: the same width, tokens, vocabulary and layer spec, one process, one thread.
Forward and backward take turns in one run; ratios are medians of paired ratios. Activation memory is what autograd
saves inside the decoder, by unique storages, parameters apart, after the forward. Writes step_time.json and
step_time.md beside this file; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """The model and batch of the benchmark."""

    layers: int = 4
    hidden: int = 256
    vocabulary: int = 512
    sequence: int = 256
    micro_batch: int = 2
    blocks: int = 3
    latents: int = 2

    @property
    def passes(self) -> int:
        return self.blocks * (self.latents + 1)


class Arm:
    """One model under Megatron's DDP, and what a step of it takes."""

    def __init__(self, size: Size, recursion: Any, layers: int) -> None:
        import torch
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        from megatron_recursive.accounting import ModelShape, flops_per_token
        from megatron_recursive.models.layer_specs import local_block_spec
        from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel, RecursiveTransformerConfig

        config = RecursiveTransformerConfig(
            num_layers=layers, hidden_size=size.hidden, num_attention_heads=4, ffn_hidden_size=4 * size.hidden,
            use_cpu_initialization=True, normalization="RMSNorm", add_bias_linear=False, hidden_dropout=0.0,
            attention_dropout=0.0, gradient_accumulation_fusion=False, persist_layer_norm=False,
            masked_softmax_fusion=False, bias_dropout_fusion=False,
        )  # fmt: skip
        self.model = RecursiveGPTModel(config, local_block_spec(config), size.vocabulary, size.sequence,
                                       position_embedding_type="rope", recursion=recursion)  # fmt: skip
        self.wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), self.model)
        shape = ModelShape(num_layers=layers, hidden_size=size.hidden, ffn_hidden_size=4 * size.hidden,
                           num_attention_heads=4, num_query_groups=4, kv_channels=size.hidden // 4,
                           vocab_size=size.vocabulary, seq_length=size.sequence, linear_bias=False,
                           norm_bias=False)  # fmt: skip
        self.flops = flops_per_token(shape, self.model.plan).total
        tokens = torch.randint(0, size.vocabulary, (size.micro_batch, size.sequence + 1))
        positions = torch.arange(size.sequence).expand(size.micro_batch, -1)
        self.inputs = (tokens[:, :-1].contiguous(), positions, None, None, tokens[:, 1:].contiguous())

    def forward(self) -> Any:
        ids, positions, mask, _, labels = self.inputs
        output = self.wrapped(ids, positions, mask, labels=labels)
        return getattr(output, "objective_BS", output).mean()

    def seconds(self) -> float:
        self.wrapped.zero_grad_buffer()
        start = time.perf_counter()
        self.forward().backward()
        return time.perf_counter() - start

    def activation_bytes(self) -> int:
        """What the graph holds for the decoder once the forward is done."""
        import torch

        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        saved: dict[int, Any] = {}
        inside = False

        def pack(tensor: Any) -> Any:
            if inside and tensor.untyped_storage().data_ptr() not in parameters:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept: no address comes twice
            return tensor

        def enter(*_: Any) -> None:
            nonlocal inside
            inside = True

        def leave(*_: Any) -> None:
            nonlocal inside
            inside = False

        hooks = (self.model.decoder.register_forward_pre_hook(enter), self.model.decoder.register_forward_hook(leave))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward()
        for hook in hooks:
            hook.remove()
        assert loss.requires_grad
        return sum(storage.nbytes() for storage in saved.values())


def measure(size: Size, rounds: int) -> dict[str, Any]:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_recursive.plan import RecursionConfig

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)

    def recursive(detach: bool) -> Arm:
        knobs = RecursionConfig(num_refinement_blocks=size.blocks, num_latent_refinements=size.latents,
                                detach_between_refinements=detach, halt_supervision="last")  # fmt: skip
        return Arm(size, knobs.resolved(embedding_init_std=0.02), size.layers)

    off = RecursionConfig(enable_recursive_refinement=False).resolved(embedding_init_std=0.02)
    arms = {"plain": Arm(size, off, size.passes * size.layers), "full": recursive(False), "detach": recursive(True)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            seconds = arm.seconds()
            if number:  # the first round warms up
                times[name].append(seconds)
        if number:
            print(f"round {number}/{rounds}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items()), flush=True)
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "time_ratio": statistics.median(t / p for t, p in zip(times[name], times["plain"], strict=True)),
            "flops_per_token": arm.flops,
            "flops_ratio": arm.flops / arms["plain"].flops,
            "activation_bytes": (held := arm.activation_bytes()),
            "memory_ratio": held / arms["plain"].activation_bytes(),
        }
        for name, arm in arms.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a recursive training step against an unrolled plain GPT's.")
    parser.add_argument("--rounds", type=int, default=15, help="paired steps of each arm (default: 15)")
    args = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    from megatron_recursive.backends import cpu

    cpu.install()
    import torch

    torch.set_num_threads(1)
    size = Size()
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        measured = measure(size, args.rounds)
        torch.distributed.destroy_process_group()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    names = {"plain": f"plain GPT, {size.passes * size.layers} layers",
             "full": f"recursive, {size.passes} passes of {size.layers} layers, full gradient",
             "detach": "recursive, detached between blocks"}  # fmt: skip
    lines = [
        "# Step time against a plain GPT of the same unrolled depth",
        "",
        f"`python benchmarks/step_time.py --rounds {args.rounds}` at commit {commit.strip()}: {size}, one CPU thread; "
        "forward and backward, medians. Ratios are to the plain GPT. Activations: what autograd saves in the decoder. "
        f"Of {size.passes} passes, {size.latents + 1} carry gradient under detach, "
        f"{(size.latents + 1) / size.passes:.3f} of all.",
        "",
        "| model | step | time ratio | FLOPs ratio | time / FLOPs | activations | memory ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in measured.items():
        share = row["time_ratio"] / row["flops_ratio"]
        lines.append(
            f"| {names[key]} | {row['seconds']:.2f} s | {row['time_ratio']:.3f} | {row['flops_ratio']:.3f} "
            f"| {share:.3f} | {row['activation_bytes'] / 2**20:.1f} MiB | {row['memory_ratio']:.3f} |"
        )
    print("\n".join(lines))
    summary = {
        "full_time_ratio": round(measured["full"]["time_ratio"], 4),
        "detach_time_ratio": round(measured["detach"]["time_ratio"], 4),
        "detach_flops_ratio": round(measured["detach"]["flops_ratio"], 4),
        "detach_memory_ratio": round(measured["detach"]["memory_ratio"], 4),
        "blocks": size.blocks,
        "latents": size.latents,
    }
    (HERE / "step_time.md").write_text("\n".join([*lines, ""]))
    record = {**summary, "arms": measured, "commit": commit.strip()}
    (HERE / "step_time.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
