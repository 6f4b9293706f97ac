"""What the example scripts run: their commands, recorded by a stand-in for torchrun, and the table of their README.

``python -m tests.examples`` renews the table; a test holds it equal.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import REPOSITORY, run_distributed
from tests.quick_start import start_quickly

FOLDER = REPOSITORY / "examples" / "recursive_gpt"
README = FOLDER / "README.md"
SCRIPTS = ("small", "medium", "large", "ablation", "detached", "one_gpu", "one_node", "multi_node", "slurm",
           "retrofit_llama", "retrofit_tinyllama", "retrofit_olmo", "ouro", "parcae", "trm")  # fmt: skip
TABLE = re.compile(r"(<!-- table: python -m tests\.examples -->\n).*?\n(?=\n|\Z)", re.DOTALL)
GPT2_VOCABULARY = ["--vocab-size", "50257"]  # of the table; the tokenizer at hand is a tiny one

# The last command writes what it was called with, NUL between the words, and whatever sbatch and scontrol would say.
STAND_INS = {
    "torchrun": 'printf "%s\\0" torchrun "$@" > "$RECORD"',
    "python": 'printf "%s\\0" python "$@" > "$RECORD"',
    "srun": 'exec "$@"',
    "scontrol": "printf 'node1\\nnode2\\n'",
}


@dataclass(frozen=True)
class Command:
    """A recorded call: flags of the launcher, flags of the training script, and how many processes that makes."""

    launcher: list[str]
    flags: list[str]
    world_size: int


def write_inputs(folder: Path) -> dict[str, str]:
    """A small data set and its tokenizer, as the variables of the scripts. (In a worker: it imports Megatron.)"""
    return run_distributed(_write_inputs, 1, str(folder), timeout=120)[0]


def _write_inputs(place: str) -> dict[str, str]:
    import json

    from megatron_recursive.data.preprocess import preprocess
    from megatron_recursive.data.tokenizer_training import train_tokenizer

    folder = Path(place)
    lines = [json.dumps({"text": f"Line {n} of a text, and of {n * n} others like it. " * 3}) for n in range(1500)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer([folder / "text.jsonl"], folder / "tokenizer", 300)
    preprocess([folder / "text.jsonl"], folder / "data", folder / "tokenizer")
    tokenizer = folder / "tokenizer"
    return {
        "DATA": str(folder / "data"), "TOKENIZER": str(tokenizer), "VOCAB": str(tokenizer / "vocab.json"),
        "MERGES": str(tokenizer / "merges.txt"), "SAVE": str(folder / "save"), "ENDPOINT": "127.0.0.1:29500",
        "START": str(folder / "start"),
    }  # fmt: skip


def run_script(name: str, variables: Mapping[str, str], record: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a script with stand-ins for the commands that it starts."""
    programs = record.parent / "programs"
    programs.mkdir(exist_ok=True)
    for program, text in STAND_INS.items():
        (programs / program).write_text(f"#!/bin/sh\n{text}\n")
        (programs / program).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-4]"}
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(record.parent), "RECORD": str(record)}
    script = ["bash", str(FOLDER / f"pretrain_{name}.sh"), *flags]
    return subprocess.run(script, env=environment | slurm | dict(variables), cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=60)  # fmt: skip


def command_of(name: str, variables: Mapping[str, str], folder: Path, *flags: str) -> Command:
    """The training command that a script ends in."""
    record = folder / f"{name}.argv"
    result = run_script(name, variables, record, *flags)
    assert result.returncode == 0, result.stderr
    program, *words = record.read_text().split("\0")[:-1]
    place = words.index(str(FOLDER / "pretrain_recursive_gpt.py"))
    launcher = words[:place]

    def count(flag: str) -> int:
        return int(launcher[launcher.index(flag) + 1]) if flag in launcher else 1

    world_size = count("--nnodes") * count("--nproc_per_node")
    assert (program == "torchrun") == bool(launcher)
    return Command(launcher, words[place + 1 :], world_size)


def facts_of(commands: Mapping[str, Command]) -> dict[str, Any]:
    """What each command would train, or the sentence that it is refused with. (Runs in a worker.)"""
    return {name: _facts_of(command) for name, command in commands.items()}


def _facts_of(command: Command) -> dict[str, Any] | str:
    import sys

    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    from megatron_recursive.errors import UserError
    from megatron_recursive.training import arguments, memory_report
    from megatron_recursive.training.model_provider import model_config_from_args, model_shape
    from megatron_recursive.training.report import run_description

    if command.launcher:
        from torch.distributed.run import parse_args

        parse_args([*command.launcher, "script"])  # exits at a flag that torchrun does not know
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(command.world_size)}
    os.environ["LOCAL_WORLD_SIZE"] = str(command.world_size)
    # START holds no checkpoint here.
    sys.argv = ["pretrain", *(flag for flag in command.flags if flag != "--exit-on-missing-checkpoint")]
    start_quickly()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arguments, "refuse_missing", lambda *_: None)
            args, recursion = arguments.parse_arguments()
        config = model_config_from_args(args, recursion)
    except UserError as error:
        return str(error)
    finally:
        destroy_global_vars()
        destroy_num_microbatches_calculator()
    plan, shape = config.plan, model_shape(config, args.seq_length)
    # As with Transformer Engine on a GPU: fused norms and activations, and dropout masks of one byte.
    recording = dataclasses.replace(
        memory_report.recording_of(args, config), dropout_mask=1 if args.hidden_dropout > 0 else 0,
        splits_norm=False, splits_activation=False,
    )  # fmt: skip
    stages = memory_report.memory_of_run(args, config, recording=recording)
    fullest = max(stages, key=lambda stage: stage.total)
    said = run_description(args, config)
    return {
        "plain": plan.is_plain, "family": plan.family, "passes": plan.num_passes,
        "with gradient": len(plan.grad_passes), "layers": shape.num_layers,
        "width": shape.hidden_size, "sequence": shape.seq_length,
        "stacks": [f"{sum(p.stack == name for p in plan.passes)} x {len(layers)}"
                   for name, layers in plan.layers_of(shape.num_layers).items() if layers],
        "blocks": recursion.num_refinement_blocks, "latents": recursion.num_latent_refinements,
        "tensor": args.tensor_model_parallel_size, "pipeline": args.pipeline_model_parallel_size,
        "data": args.data_parallel_size, "held": said["parameters held"], "unrolled": said["parameters unrolled"],
        "flops": said["FLOPs per token"], "weights": fullest.weights, "activations": fullest.activations,
        "save": args.save, "bf16": args.bf16, "train": args.train_iters,
    }  # fmt: skip


def commands_of_scripts(variables: Mapping[str, str], folder: Path) -> dict[str, Command]:
    """The commands of all scripts, at the vocabulary of the table."""
    return {name: command_of(name, variables, folder, *GPT2_VOCABULARY) for name in SCRIPTS}


def table_of(facts: Mapping[str, Any]) -> str:
    """The table of the README, from the facts of every script."""
    lines = [
        "| script | model | plan | ranks | parameters held, unrolled | FLOPs per token | memory per rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, fact in facts.items():
        made_of = f"{fact['blocks']} x ({fact['latents']} + 1) = {fact['passes']} passes"
        if fact["family"] != "core":
            made_of = f"{fact['family']}, {' + '.join(fact['stacks'])} layers = {fact['passes']} passes"
        plan = f"{made_of}, {fact['with gradient']} recorded"
        ranks = [f"{fact[kind]} {kind}" for kind in ("tensor", "pipeline", "data") if fact[kind] > 1]
        model = f"{fact['layers']} x {fact['width']}, sequence {fact['sequence']}"
        weights, activations = fact["weights"] / 1e9, fact["activations"] / 1e9
        lines.append(
            f"| [pretrain_{name}.sh](pretrain_{name}.sh) | {model} | {'off' if fact['plain'] else plan} | "
            f"{' x '.join(ranks) or 1} | {fact['held'] / 1e6:,.0f} M, {fact['unrolled'] / 1e6:,.0f} M | "
            f"{fact['flops'] / 1e9:.2f} G | {weights:.1f} + {activations:.1f} GB |"
        )
    return "\n".join(lines)


def renewed(facts: Mapping[str, Any]) -> str:
    """The README's text with the table as the scripts make it now."""
    return TABLE.sub(lambda found: f"{found[1]}{table_of(facts)}\n", README.read_text())


def renew() -> None:
    """Write the README's table anew."""
    with tempfile.TemporaryDirectory() as scratch:
        commands = commands_of_scripts(write_inputs(Path(scratch)), Path(scratch))
        README.write_text(renewed(run_distributed(facts_of, 1, commands, timeout=120)[0]))


if __name__ == "__main__":
    from tests import examples  # workers import the functions by the name of their module

    examples.renew()
