"""Generation with the Hugging Face model: what caching, the fixed depth and leaving early cost and save.

    python benchmarks/generate.py

Three comparisons on random weights, float32, one thread, greedy ``generate``; the arms take turns in one run, ratios
are medians of paired ratios. (1) With a cache against without, up to 256 tokens. (2) V passes over L layers against
transformers' Llama of V * L layers of the same width. (3) Exits that are forced to known blocks (uniform over 1 to T,
drawn for each step) against all T blocks, beside what the counted FLOPs predict, heads included. At batch 8 also with a
block drawn for each sequence of a step: that saves FLOPs, but hardly time where 2 rows of a matrix product take as long
as 8, as on a CPU. So the layers are timed at every number of rows, without attention, heads or exits: what these times
allow those draws to save is the limit of everything that decodes in step. Times are CPU time (user and system) of the
process, since others may share the machine. Writes generate.json and generate.md beside this file; the last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """The model of the benchmark, and the texts."""

    layers: int = 2
    hidden: int = 768
    heads: int = 12
    mlp: int = 2048
    vocabulary: int = 8192
    blocks: int = 4
    latents: int = 1
    prompt: int = 16
    new: int = 48
    cache_prompt: int = 224
    cache_new: int = 32

    @property
    def passes(self) -> int:
        return self.blocks * (self.latents + 1)


def shared_settings(size: Size) -> dict[str, Any]:
    return dict(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.mlp,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def recursive_model(size: Size) -> Any:
    from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig
    from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM
    from megatron_recursive.plan import RecursionConfig, build_plan

    knobs = RecursionConfig(num_refinement_blocks=size.blocks, num_latent_refinements=size.latents)
    knobs = knobs.resolved(embedding_init_std=0.02)
    plan = json.loads(build_plan(knobs).to_json())
    config = RecursiveGPTConfig(
        num_layers=size.layers, plan=plan, recursion=knobs.to_dict(), **shared_settings(size)
    )
    return RecursiveGPTForCausalLM(config).eval()


def plain_model(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=size.layers * size.passes, **shared_settings(size))
    return LlamaForCausalLM(config).eval()


class ForcedExits:
    """Stands in for the halting head: tokens leave after a block that is drawn for each step, a prompt after the last.

    ``mixed`` draws for each sequence of the step, otherwise all of them leave together.

    It is asked once a block for the tokens that are still there, in their order; ``begin`` is a hook on each forward.
    """

    def __init__(self, blocks: int, seed: int, mixed: bool) -> None:
        import torch

        self.blocks, self.mixed = blocks, mixed
        self.generator = torch.Generator().manual_seed(seed)
        self.wanted: Any = None
        self.block = 0

    def begin(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        import torch

        batch, length = kwargs["input_ids"].shape
        self.block = 0
        if length > 1:
            self.wanted = torch.full((batch * length,), self.blocks)
        else:
            drawn = torch.randint(1, self.blocks + 1, (batch if self.mixed else 1,), generator=self.generator)
            self.wanted = drawn.expand(batch)

    def __call__(self, hidden: Any) -> Any:
        import torch

        assert len(hidden) == len(self.wanted)
        self.block += 1
        leaves = self.wanted <= self.block
        self.wanted = self.wanted[~leaves]
        return torch.where(leaves, 20.0, -20.0)


def seconds(model: Any, size: Size, batch: int = 1, prompt: int = 0, new: int = 0, **options: Any) -> float:
    """The CPU time of one ``generate`` of ``new`` tokens behind ``prompt`` fixed ones."""
    import torch

    prompt, new = prompt or size.prompt, new or size.new
    generator = torch.Generator().manual_seed(prompt + batch)
    tokens = torch.randint(1, size.vocabulary, (batch, prompt), generator=generator)
    start = time.process_time()
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False, **options
    )
    assert output.shape[1] == prompt + new
    return time.process_time() - start


def paired(arms: dict[str, Callable[[], float]], rounds: int, what: str) -> dict[str, list[float]]:
    """Times of arms that take turns; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            took = arm()
            if number:
                times[name].append(took)
        if number:
            shown = ", ".join(f"{name} {each[-1]:.2f} s" for name, each in times.items())
            print(f"{what}, round {number}/{rounds}: {shown}", flush=True)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def measure(size: Size, rounds: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(1)
    ours = recursive_model(size)
    long = {"prompt": size.cache_prompt, "new": size.cache_new}
    times = paired(
        {name: partial(seconds, ours, size, use_cache=name == "cached", **long) for name in ("cached", "uncached")},
        max(rounds // 3, 1), "cache",
    )  # fmt: skip
    measured: dict[str, Any] = {"cache_speedup": ratio(times, "uncached", "cached"), "cache": _medians(times)}

    arms = {"ours": partial(seconds, ours, size), "plain": partial(seconds, plain_model(size), size)}
    times = paired(arms, rounds, "fixed depth")
    measured |= {"vs_plain_ratio": ratio(times, "plain", "ours"), "plain": _medians(times)}
    del arms

    for name, (batch, mixed) in HALTING.items():
        measured[name] = _measure_halting(ours, size, batch, mixed, rounds)
    measured["halting_efficiency"] = min(measured[name]["efficiency"] for name in ("batch_1", "batch_8"))
    measured["halting_efficiency_mixed"] = measured["batch_8_mixed"]["efficiency"]
    measured |= _limit_in_step(ours, size, 8, rounds, measured["batch_8_mixed"]["predicted"])
    return measured


def _limit_in_step(model: Any, size: Size, batch: int, rounds: int, predicted: float) -> dict[str, Any]:
    """What a block takes by the rows that are left, and the share of the FLOPs' prediction that this allows."""
    import torch

    @torch.no_grad()
    def block(rows: int) -> float:
        hidden, start = torch.randn(rows, 1, size.hidden), time.process_time()
        for _ in range(5):
            for index in range(size.latents + 1):
                model.model.run_pass(index, hidden)
        return (time.process_time() - start) / 5

    every = [*range(1, batch + 1), batch * size.prompt]
    times = paired({f"{rows} rows": partial(block, rows) for rows in every}, 2 * rounds, "a block")
    took = {rows: statistics.median(times[f"{rows} rows"]) for rows in every}
    forced, in_step = ForcedExits(size.blocks, batch, mixed=True), size.blocks * took[batch * size.prompt]
    everything = in_step + (size.new - 1) * size.blocks * took[batch]
    for _ in range(size.new - 1):
        forced.begin(None, (), {"input_ids": torch.zeros(batch, 1)})
        for number in range(size.blocks):
            in_step += took.get(int((forced.wanted > number).sum()), 0.0)
    shown = {rows: 1e3 * each for rows, each in took.items()}
    return {"block_ms_by_rows": shown, "limit_in_step": everything / in_step / predicted}


HALTING = {"batch_1": (1, False), "batch_8": (8, False), "batch_8_mixed": (8, True)}


def _measure_halting(model: Any, size: Size, batch: int, mixed: bool, rounds: int) -> dict[str, Any]:
    """All blocks against forced exits, the same in every round."""
    head = model.halting_logits

    def halting() -> float:
        forced = ForcedExits(size.blocks, batch, mixed)
        hook = model.register_forward_pre_hook(forced.begin, with_kwargs=True)
        model.halting_logits = forced
        try:
            return seconds(model, size, batch, exit="halting")
        finally:
            model.halting_logits = head
            hook.remove()

    times = paired({"all": lambda: seconds(model, size, batch), "exits": halting}, rounds, f"exits, batch {batch}")
    report = model.last_exit_report
    predicted = report.fixed_depth_flops / report.flops
    speedup = ratio(times, "all", "exits")
    return {
        **_medians(times), "speedup": speedup, "predicted": predicted, "efficiency": speedup / predicted,
        "mean_decoded_blocks": report.mean_decoded_blocks,
    }  # fmt: skip


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {f"{name}_seconds": statistics.median(each) for name, each in times.items()}


def report_lines(size: Size, measured: dict[str, Any], rounds: int, commit: str) -> list[str]:
    lines = [
        "# Generation",
        "",
        f"`python benchmarks/generate.py --rounds {rounds}` at commit {commit}: {size}, float32 on one CPU thread, "
        "random weights, greedy; medians of CPU times, and of paired ratios. Time includes reading the prompt.",
        "",
        "| what | against | time | time | ratio |",
        "|---|---|---|---|---|",
        f"| cached, to {size.cache_prompt + size.cache_new} tokens, the last {size.cache_new} generated | uncached "
        f"| {measured['cache']['cached_seconds']:.2f} s | {measured['cache']['uncached_seconds']:.2f} s "
        f"| {measured['cache_speedup']:.1f} times as fast |",
        f"| {size.passes} passes of {size.layers} layers, all of them | transformers' Llama, "
        f"{size.passes * size.layers} layers | {measured['plain']['ours_seconds']:.2f} s "
        f"| {measured['plain']['plain_seconds']:.2f} s | {measured['vs_plain_ratio']:.3f} times the tokens a second |",
    ]
    for name, (batch, mixed) in HALTING.items():
        row = measured[name]
        how = f"batch {batch}{', each sequence its own' if mixed else ''}"
        lines.append(
            f"| exits forced to {row['mean_decoded_blocks']:.2f} of {size.blocks} blocks, {how} | all blocks "
            f"| {row['exits_seconds']:.2f} s | {row['all_seconds']:.2f} s | {row['speedup']:.2f} times as fast; FLOPs "
            f"predict {row['predicted']:.2f}; efficiency {row['efficiency']:.3f} |"
        )
    shown = ", ".join(f"{rows}: {each:.1f}" for rows, each in measured["block_ms_by_rows"].items())
    return [
        *lines, "",
        f"A block of so many rows takes, layers alone, in ms: {shown}. With these times no decoding that goes in step "
        f"reaches more than {measured['limit_in_step']:.3f} of what FLOPs predict for each sequence its own block.",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Time generation: cache, fixed depth, exits.")
    parser.add_argument("--rounds", type=int, default=6, help="paired runs (default: 6; a third for the cache)")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    size = Size()
    measured = measure(size, args.rounds)
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    lines = report_lines(size, measured, args.rounds, shown.strip())
    print("\n".join(lines))
    (HERE / "generate.md").write_text("\n".join([*lines, ""]))
    (HERE / "generate.json").write_text(json.dumps({**measured, "commit": shown.strip()}, indent=1) + "\n")
    names = ("cache_speedup", "vs_plain_ratio", "halting_efficiency", "halting_efficiency_mixed", "limit_in_step")
    print(json.dumps({name: round(measured[name], 4) for name in names}))


if __name__ == "__main__":
    main()
