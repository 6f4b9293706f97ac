"""The example scripts: every one is parsed as the training command would, two are run."""

from __future__ import annotations

import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import examples
from tests.distributed import run_command, run_distributed
from tests.examples import FOLDER, SCRIPTS, Command
from tests.unit_tests.training.runs import in_worker, losses_of, metrics_of, records_of

TINY = (
    "--hidden-size 32 --num-attention-heads 4 --num-layers 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 8 --lr-warmup-iters 1 --log-interval 1 --eval-iters 1 --split 90,5,5 "
    "--num-workers 0 --num-latent-refinements 1"
).split()


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return examples.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def commands(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    return examples.commands_of_scripts(variables, tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def facts(commands: dict[str, Command]) -> dict[str, Any]:
    (facts,) = run_distributed(examples.facts_of, 1, commands, timeout=120)
    return facts


def test_every_script_is_known() -> None:
    names = {file.stem.removeprefix("pretrain_") for file in FOLDER.glob("*.sh")}
    assert names == {*SCRIPTS, "default", "finetune_chat", "finetune_text"}


def test_no_script_is_refused(facts: dict[str, Any], variables: dict[str, str]) -> None:
    assert {name: fact for name, fact in facts.items() if isinstance(fact, str)} == {}
    assert all(fact["bf16"] and fact["save"] == variables["SAVE"] for fact in facts.values())


def plan_and_layout(fact: dict[str, Any]) -> tuple[int, ...]:
    keys = ("layers", "width", "sequence", "passes", "with gradient", "tensor", "pipeline", "data")
    return tuple(fact[key] for key in keys)


EXPECTED = {
    "small": (6, 512, 512, 10, 10, 1, 1, 1),
    "medium": (12, 768, 1024, 21, 21, 1, 1, 1),
    "large": (24, 1024, 2048, 45, 45, 2, 4, 1),
    "ablation": (12, 768, 1024, 1, 1, 1, 1, 1),
    "detached": (12, 768, 1024, 21, 7, 1, 1, 1),
    "one_gpu": (12, 768, 2048, 21, 21, 1, 1, 1),
    "one_node": (24, 1024, 2048, 21, 21, 2, 2, 2),
    "multi_node": (24, 2048, 4096, 21, 21, 2, 4, 2),
    "slurm": (24, 2048, 4096, 21, 21, 2, 4, 4),
    "retrofit_llama": (8, 2048, 1024, 34, 10, 1, 1, 8),
    "retrofit_tinyllama": (16, 2048, 1024, 18, 10, 1, 1, 8),
    "retrofit_olmo": (14, 2048, 1024, 34, 10, 1, 1, 8),
    "ouro": (24, 2048, 4096, 4, 4, 1, 1, 8),
    "parcae": (6, 768, 2048, 10, 6, 1, 1, 1),
    "trm": (2, 512, 512, 21, 7, 1, 1, 1),
}


def test_plans_and_layouts(facts: dict[str, Any]) -> None:
    assert {name: plan_and_layout(fact) for name, fact in facts.items()} == EXPECTED


def test_the_table_is_the_scripts(facts: dict[str, Any]) -> None:
    text = examples.README.read_text()
    assert text == examples.renewed(facts), "run python -m tests.examples to renew the table"
    assert all(f"pretrain_{name}.sh" in text for name in SCRIPTS)


def test_the_nodes_of_a_job_meet_at_its_first(variables: dict[str, str], tmp_path: Path) -> None:
    slurm = examples.command_of("slurm", variables, tmp_path)
    places = dict(zip(slurm.launcher[::2], slurm.launcher[1::2], strict=True))
    assert places["--rdzv_endpoint"] == "node1:29500" and places["--rdzv_id"] == "recursive-7"
    assert places["--nnodes"] == "4" and "--exit-signal-handler" in slurm.flags


def test_a_later_flag_wins_and_what_cannot_work_is_refused(variables: dict[str, str], tmp_path: Path) -> None:
    short = ["--train-iters", "7", "--lr-warmup-iters", "1"]
    medium = examples.command_of("medium", {**variables, "GPUS": "4"}, tmp_path, *short)
    large = examples.command_of("large", variables, tmp_path, "--pipeline-model-parallel-size", "5")
    (facts,) = run_distributed(examples.facts_of, 1, {"medium": medium, "large": large})
    assert (facts["medium"]["train"], facts["medium"]["data"]) == (7, 4)
    assert "--pipeline-model-parallel-size 5" in facts["large"]


def test_the_other_ways_to_call_a_recipe(variables: dict[str, str], tmp_path: Path) -> None:
    """(script, its variables) -> words that its flags then have, and those that they lack."""
    scratch = {key: value for key, value in variables.items() if key != "START"}
    begun, start = str(tmp_path / "begun"), f"--load {variables['START']} --finetune"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "latest_checkpointed_iteration.txt").write_text("7")
    mixed = f"0.5 {variables['DATA']} 0.5 {variables['DATA']}"
    ways: list[tuple[str, dict[str, str], tuple[str, ...], tuple[str, ...]]] = [
        ("retrofit_llama", variables, (start, "--num-recurrences 32", "--embedding-multiplier 1"), ()),
        ("retrofit_llama", {**scratch, "RECURRENCES": "4"}, ("--num-recurrences 4",), ("--finetune", "multiplier")),
        ("retrofit_llama", {**variables, "SAVE": begun}, (f"--load {begun} --embedding-multiplier 1",), ("--fine",)),
        ("retrofit_tinyllama", variables, (start, "ellis_adam --lr 5e-5", "curriculum 1-sqrt"), ("--decoupled-lr",)),
        ("retrofit_tinyllama", {**variables, "PHASE": "task", "OPTIMIZER": "muon", "DATA": mixed},
         (start, "muon --lr 1e-3 --decoupled-lr 5e-5", f"--data-path {mixed} --split"), ("curriculum",)),
        ("retrofit_tinyllama", {**variables, "SAVE": begun, "OPTIMIZER": "adam"}, ("adam --lr 5e-5",), ("--finetune",)),
        ("ouro", variables, ("--exit-gate",), ("--train-only", "--finetune")),
        ("ouro", {**variables, "STAGE": "2"}, ("--train-only heads", start), ()),
        ("ouro", {**scratch, "STAGE": "2", "SAVE": begun}, ("--train-only heads", f"--load {begun}"), ("--finetune",)),
    ]  # fmt: skip
    commands = {}
    for number, (name, given, has, lacks) in enumerate(ways):
        command = examples.command_of(name, given, tmp_path)
        words = " ".join(command.flags)
        if given.get("SAVE") != begun:  # which has a tracker and no checkpoint
            commands[f"{number} {name}"] = command
        assert all(each in words for each in has) and not any(each in words for each in lacks), words
    (facts,) = run_distributed(examples.facts_of, 1, commands, timeout=120)
    ((refused, why),) = [(name, fact) for name, fact in facts.items() if isinstance(fact, str)]
    assert refused == "7 ouro" and "give those of a model, with --load" in why, "START holds no checkpoint here"
    for given, said in ((scratch, "START: is the checkpoint"), ({**variables, "PHASE": "x"}, "PHASE is heal or task")):
        result = examples.run_script("retrofit_tinyllama", given, tmp_path / "argv")
        assert result.returncode != 0 and said in result.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_missing_variable_is_named(name: str, variables: dict[str, str], tmp_path: Path) -> None:
    given = {key: value for key, value in variables.items() if key != "DATA"}
    result = examples.run_script(name, given, tmp_path / "argv")
    assert result.returncode != 0 and "DATA: is the prefix" in result.stderr
    assert not (tmp_path / "argv").exists()


# The commands of this model's first description: flags | processes.
FIRST = (
    "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024 "
    "--micro-batch-size 4 --global-batch-size 32 --lr 1.5e-4 --train-iters 100000 --split 949,50,1 "
    "--num-refinement-blocks 3 --num-latent-refinements 6 --halt-loss-weight 1.0"
)
FIRST_COMMANDS = {
    "one GPU": (f"{FIRST} --detach-between-refinements", 1),
    "eight GPUs": (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --num-layers 24 --hidden-size 1024 "
        "--num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 2 "
        "--global-batch-size 128 --lr 1.5e-4 --train-iters 500000 --split 949,50,1 --num-refinement-blocks 5 "
        "--num-latent-refinements 8 --halt-loss-weight 0.5",
        8,
    ),
    "ablation": (f"{FIRST} --disable-recursive-refinement", 1),
    "full gradient": (f"{FIRST} --no-detach-between-refinements", 1),
    "halting": (f"{FIRST} --halt-threshold 0.7 --max-inference-refinement-steps 20", 1),
    "less memory": (f"{FIRST} --recompute-activations --tensor-model-parallel-size 2", 2),
    "profile": (f"{FIRST} --profile --halt-loss-weight 5.0 --tensorboard-dir SAVE", 1),  # it must be given a place
}


def test_the_first_commands_parse_as_they_stand(variables: dict[str, str]) -> None:
    files = ["--data-path", variables["DATA"], "--vocab-file", variables["VOCAB"], "--merge-file", variables["MERGES"]]
    commands = {
        name: Command([], [variables.get(flag, flag) for flag in flags.split()] + files, size)
        for name, (flags, size) in FIRST_COMMANDS.items()
    }
    (facts,) = run_distributed(examples.facts_of, 1, commands, timeout=120)
    assert {name: fact for name, fact in facts.items() if isinstance(fact, str)} == {}
    passes = {name: (fact["passes"], fact["with gradient"]) for name, fact in facts.items()}
    assert passes == {
        "one GPU": (21, 7), "eight GPUs": (45, 45), "ablation": (1, 1), "full gradient": (21, 21), "halting": (21, 21),
        "less memory": (21, 21), "profile": (21, 21),
    }  # fmt: skip


def train(name: str, variables: dict[str, str], *flags: str) -> None:
    """Run a script as a user would, with the real torchrun."""
    environment = {**variables, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                   "PET_LOCAL_ADDR": "127.0.0.1"}  # fmt: skip
    script = str(FOLDER / f"pretrain_{name}.sh")
    result = run_command(["bash", script, *TINY, *flags], env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.grid
def test_the_smallest_trains_on_the_cpu(variables: dict[str, str], tmp_path: Path) -> None:
    train("small", {**variables, "SAVE": str(tmp_path)}, "--train-iters", "6", "--lr", "1e-2")
    losses = losses_of(tmp_path)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < losses[1]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "6"


def write_model(folder: Path, texts: Path) -> None:
    """A tiny model of Hugging Face's, whose tokenizer has a chat template."""
    import torch
    import transformers

    from megatron_recursive.data.tokenizer_training import train_tokenizer

    train_tokenizer([texts], folder, 300)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 64, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(folder)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


# Stands for megatron-recursive, which the scripts call by name where no .venv lies beside them.
RECORDING = """#!/bin/sh
echo "$*" >> "$CALLED"
mkdir -p "$SAVE/start" "$SAVE/data"
case "$*" in
  convert*--resize-vocab*) rows=$IDS ;;
  *) rows=10 ;;
esac
case "$1" in
  convert) echo release > "$SAVE/start/latest_checkpointed_iteration.txt"
    echo "--vocab-size=$rows" > "$SAVE/start/megatron_args.txt" ;;
  prepare-chat) printf '{\\n "vocab_size": %s,\\n "vocabulary": ""\\n}' "$IDS" > "$SAVE/data/train.idx.json" ;;
esac
"""


@pytest.mark.parametrize("name", ["chat", "text"])
def test_fine_tuning_goes_on_from_the_model_that_it_began_with(name: str, tmp_path: Path) -> None:
    """The text is prepared by each start, which refuses another."""
    for place, text in ((f"examples/recursive_gpt/finetune_{name}.sh", (FOLDER / f"finetune_{name}.sh").read_text()),
                        ("bin/megatron-recursive", RECORDING)):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(text)
        (tmp_path / place).chmod(0o755)
    save, called = tmp_path / "run", tmp_path / "called"
    script = tmp_path / "examples" / "recursive_gpt" / f"finetune_{name}.sh"

    def start(model: str, **more: str) -> tuple[int, str, list[str]]:
        given = {"MODEL": model, "SAVE": str(save), "TEXT": "text.jsonl", "CALLED": str(called), "IDS": "10", **more}
        called.write_text("")
        environment = {**given, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        result = run_command(["bash", script], env=environment, timeout=60)
        return result.returncode, result.stderr, [line.split()[0] for line in called.read_text().splitlines()]

    prepare = {"chat": "prepare-chat", "text": "preprocess"}[name]
    assert start("a") == (0, "", ["convert", prepare, "pretrain"])
    assert start("a") == (0, "", [prepare, "pretrain"])
    plain = "--disable-recursive-refinement"
    for other, looped in (("b", {}), ("a", {"RECURSION": "--recursion-family looped"})):
        now = f"{other} {looped.get('RECURSION', plain)}"
        sentence = f"error: {save} goes on from a {plain}; name another SAVE for {now}.\n"
        assert start(other, **looped) == (2, sentence, [])
    (save / "start.txt").unlink()  # as an earlier version left it
    assert start("b") == (0, "", [prepare, "pretrain"])

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps({"model_type": "recursive_gpt"}, indent=2))
    grown = {"SAVE": str(tmp_path / "grown"), "IDS": "17"}  # a chat template has brought seven tokens
    again = ["convert"] * (name == "chat")
    assert start(str(tmp_path / "c"), **grown) == (0, "", ["convert", prepare, *again, "pretrain"])
    imports = [line for line in called.read_text().splitlines() if line.startswith("convert")]
    assert not any(plain in line for line in imports), "its recursion is kept"
    assert all(line.endswith(f"--resize-vocab {tmp_path}/grown/data/train_tokenizer") for line in imports[1:])
    assert start(str(tmp_path / "c"), **grown) == (0, "", [prepare, "pretrain"])


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["chat", "text"])
def test_fine_tuning_from_a_hugging_face_folder(name: str, tmp_path: Path) -> None:
    """The second start goes on from the first, by lines that both scripts have; one of them is started again."""
    lines = [[line for line in (FOLDER / f"finetune_{each}.sh").read_text().splitlines() if "load" in line.lower()]
             for each in ("chat", "text")]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 3
    texts = [{"text": f"Line {n} of a text, and of {n * n} others like it. " * 5} for n in range(200)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    run_distributed(write_model, 1, tmp_path / "model", tmp_path / "text.jsonl")
    save = tmp_path / "run"
    given = {"MODEL": str(tmp_path / "model"), "SAVE": str(save), "TEXT": str(tmp_path / "text.jsonl"), "LENGTH": "900"}
    environment = {**given, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["bash", str(FOLDER / f"finetune_{name}.sh"), "--lr", "1e-2", "--min-lr", "1e-3"]
    for flags in (["--exit-interval", "3"], [])[name == "text" :]:
        result = run_command([*script, *flags], env=environment, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        assert name == "text" or flags or "sample at iteration 5: 'What does a recursive" in result.stdout
    losses, best = metrics_of(save), json.loads((save / "best" / "best.json").read_text())
    assert list(losses) == list(range(1, len(losses) + 1)) and len(losses) > 3
    assert losses[len(losses)]["lm loss"] < losses[1]["lm loss"]
    assert all(("token accuracy" in record) == (name == "chat") for record in records_of(save, "valid"))
    assert (save / "best" / f"iter_{best['iteration']:07d}" / "run.json").is_file()


@pytest.mark.heavy
def test_two_agents_train_as_one(variables: dict[str, str], tmp_path: Path) -> None:
    """Two torchrun agents that meet on the loopback, of one rank each, and two ranks that never heard of agents."""
    flags = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2", "--ffn-hidden-size", "64",
             "--num-query-groups", "2", "--train-iters", "4"]  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    agents = {**variables, "SAVE": two, "NNODES": "2", "GPUS": "1", "ENDPOINT": endpoint, "JOB": "two"}
    with ThreadPoolExecutor(2) as pool:
        for agent in [pool.submit(train, "multi_node", agents, *flags) for _ in range(2)]:
            agent.result()
    command = examples.command_of("multi_node", {**agents, "SAVE": one}, tmp_path, *TINY, *flags)
    assert run_distributed(in_worker, 2, command.flags, timeout=120) == [None, None]
    assert sorted(losses_of(tmp_path / "two")) == [1, 2, 3, 4]
    assert metrics_of(tmp_path / "two") == metrics_of(tmp_path / "one")
