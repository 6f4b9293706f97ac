"""--chat-data, --train-epochs and --keep-best in whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.chat_data import write_chat
from tests.unit_tests.training.runs import FLAGS, metrics_of, records_of, refusals, save_to, tensors_of, train

LENGTHS = [5, 9, 3, 17, 4, 8, 11, 4, 16, 7, 6, 13, 12, 10, 5, 5, 9, 17, 3, 14]
HELD_OUT = [9, 4, 12, 8, 15]
ON_CHAT = [flag for flag in FLAGS if flag != "--mock-data"]
for without in ("--train-iters", "--split", "--lr-decay-iters", "--eval-iters", "--eval-interval"):
    place = ON_CHAT.index(without)
    del ON_CHAT[place : place + 2]
STILL = ["--hidden-dropout", "0", "--attention-dropout", "0"]


@pytest.fixture
def chat(tmp_path: Path) -> dict[str, int]:
    """Supervised tokens of the conversations to train on, and of those held out."""
    return {"chat": write_chat(tmp_path / "chat", LENGTHS), "held": write_chat(tmp_path / "held", HELD_OUT, seed=1)}


def data(folder: Path, *more: str) -> list[str]:
    return ["--chat-data", str(folder / "chat"), "--valid-chat-data", str(folder / "held"), *more]


def test_an_epoch_counts_the_supervised_tokens_and_evaluates_the_held_out_ones(
    tmp_path: Path, chat: dict[str, int]
) -> None:
    flags = [*data(tmp_path, "--train-epochs", "2", "--eval-interval", "3", "--log-interval", "2"), *STILL]
    assert train(*flags, *save_to(tmp_path / "run"), flags=ON_CHAT) is None
    records = records_of(tmp_path / "run", "train")
    assert sum(record["supervised tokens"] for record in records) == 2 * chat["chat"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert run["calculate_per_token_loss"] and run["eval_iters"] == 1
    valid = records_of(tmp_path / "run", "valid")
    assert len(valid) == -(-run["train_iters"] // 3)
    assert train(*flags, *save_to(tmp_path / "run"), flags=ON_CHAT) is None, "it is at its end: nothing is left to read"
    for record in valid:
        assert record["perplexity"] == pytest.approx(math.exp(record["lm loss"]))
        right = record["token accuracy"] * chat["held"]  # of all held-out tokens, each once
        assert 0 <= right <= chat["held"] and right == pytest.approx(round(right), abs=1e-3)


def best_of(folder: Path) -> tuple[int, float]:
    (kept,) = (folder / "best").glob("iter_*")
    record = json.loads((folder / "best" / "best.json").read_text())
    assert (kept / "metadata.json").is_file() and (kept / "run.json").is_file()
    assert kept.name == f"iter_{record['iteration']:07d}"
    assert (folder / "best" / "latest_checkpointed_iteration.txt").read_text() == str(record["iteration"])
    return record["iteration"], record["lm loss"]


@pytest.mark.grid
def test_the_best_checkpoint_stays_over_resume_and_retention(tmp_path: Path) -> None:
    """On plain text. A rate that is too high makes the loss rise again."""
    run = tmp_path / "run"
    flags = ["--eval-iters", "1", "--eval-interval", "1", "--keep-best", "--train-iters", "8", *STILL]
    assert train(*flags, *save_to(run, 1), "--exit-interval", "4", "--lr", "0.1") is None
    first = {record["iteration"]: record["lm loss"] for record in records_of(run, "valid")}
    iteration, loss = best_of(run)
    assert loss == min(first.values()) == first[iteration]
    kept, saved = (tensors_of(place / f"iter_{iteration:07d}") for place in (run / "best", run))
    assert kept.keys() == saved.keys() and all(kept[name].equal(saved[name]) for name in kept)

    resumed = ["--lr", "3.0", "--override-opt_param-scheduler", "--save-retain-interval", "100"]
    assert train(*flags, *save_to(run, 1), *resumed) is None
    second = {record["iteration"]: record["lm loss"] for record in records_of(run, "valid")}
    assert len(second) == 8 and min(second[i] for i in range(5, 9)) > loss
    assert best_of(run) == (iteration, loss)
    assert {f"iter_000000{n}" for n in (4, 5, 6, 7)}.isdisjoint(file.name for file in run.glob("iter_*"))
    assert train(*flags, *save_to(run, 1), *resumed, "--train-iters", "9", "--seed", "9") is None
    assert best_of(run)[0] == 9, "a loss of other held-out samples is none to beat"


@pytest.mark.grid
def test_a_resumed_run_evaluates_at_another_interval(tmp_path: Path, chat: dict[str, int]) -> None:
    """By the new interval the run reads less in its evaluations than it has read already."""
    flags, run = data(tmp_path, "--train-iters", "6", *STILL), tmp_path / "run"
    assert train(*flags, "--eval-interval", "1", "--exit-interval", "4", *save_to(run, 4), flags=ON_CHAT) is None
    assert train(*flags, "--eval-interval", "3", *save_to(run, 4), flags=ON_CHAT) is None
    assert [record["iteration"] for record in records_of(run, "valid")] == [1, 2, 3, 4, 6]


REFUSED = {
    "--data-path {chat}": "--data-path and --chat-data exclude each other",
    "--mock-data": "--mock-data and --chat-data exclude each other",
    "--reset-attention-mask": "--reset-attention-mask and --chat-data exclude each other",
    "--seq-length 15": "has a sample of 17 tokens, for which --seq-length 15 is too short; give --seq-length 16",
    "--train-epochs 0": "--train-epochs is 0; give a positive number",
    "--split 0,1,0": "--split 0,1,0 must be up to three numbers",
    "--split 99,1,0": "leaves none for valid; give --split 90,10,0",
    "--chat-data {folder}/nowhere": "nowhere.bin does not exist; mend the path, or write it again with",
    "--keep-best": "--keep-best needs --save",
    "--sft": "(--sft) yet; use --chat-data PREFIX, whose evaluations average tokens",
    "--dataloader-type cyclic": "--dataloader-type cyclic has its own order",
    "--tokenizer-type NullTokenizer --vocab-size 90": "holds the token id 125, but this run's tokenizer makes",
}


def test_what_contradicts_is_refused(tmp_path: Path, chat: dict[str, int]) -> None:
    both = ["--chat-data", str(tmp_path / "chat"), "--train-epochs", "1", "--make-vocab-size-divisible-by", "1"]
    commands = []
    for flags in REFUSED:
        filled = flags.format(chat=tmp_path / "chat", folder=tmp_path).split()
        commands.append([*both, *([] if "--split" in filled else ["--split", "80,20,0"]), *filled])
    commands += [["--train-iters", "3", "--mock-data", "--valid-chat-data", tmp_path / "held"],
                 ["--train-epochs", "2", "--mock-data"]]  # fmt: skip
    *sentences, held, epochs = refusals(commands, flags=ON_CHAT)
    for (flags, expected), said in zip(REFUSED.items(), sentences, strict=True):
        assert expected in said and said.endswith(".") and said.count(". ") == 0, (flags, said)
    assert held == "--valid-chat-data needs --chat-data, the conversations to train on."
    assert epochs == "--train-epochs needs --chat-data, or --data-path with one prefix on this machine."


@pytest.mark.grid
def test_epochs_of_text_and_a_later_flag_of_iterations(tmp_path: Path, chat: dict[str, int]) -> None:
    """Of 178 tokens, two epochs fill 22 samples of 16 and the label of the last; a batch has 4."""
    flags = ["--data-path", str(tmp_path / "chat"), "--split", "1,0,0", "--eval-iters", "0"]
    assert sum(LENGTHS) == 178
    for more, expected in ((["--train-iters", "9", "--train-epochs", "2"], 5), (["--train-epochs", "1"], 2)):
        run = tmp_path / str(expected)
        assert train(*flags, *more, *save_to(run, 1), flags=ON_CHAT) is None
        assert max(metrics_of(run)) == expected
    said = str(train(*flags, "--train-epochs", "2", "--train-iters", "3", flags=ON_CHAT))
    assert said == "--train-epochs and --train-iters exclude each other; leave one of them out."
    said = str(train(*flags, "--train-epochs", "1", "--global-batch-size", "12", flags=ON_CHAT))
    assert "has 178 tokens to train on, which fill no batch of 12 samples in --train-epochs 1" in said


LAYOUTS = {
    "larger micro-batches": (1, ["--micro-batch-size", "4"]),
    "DP 2": (2, ["--micro-batch-size", "1", "--global-batch-size", "4"]),
    "TP 2 x PP 2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}


@pytest.mark.grid
def test_ranks_train_as_one_process(tmp_path: Path, chat: dict[str, int]) -> None:
    """From one checkpoint, on packed conversations of which micro-batches have different numbers of tokens."""
    rope = ["--position-embedding-type", "rope", "--padded-vocab-size", "128"]
    flags = [*data(tmp_path, "--train-epochs", "1", "--eval-interval", "2"), "--micro-batch-size", "1", *STILL, *rope]
    start = save_to(tmp_path / "start", 1)
    assert train(*flags, *start, "--exit-interval", "1", "--lr", "0", flags=ON_CHAT) is None
    load = ["--load", str(tmp_path / "start"), "--no-load-rng", "--finetune", "--lr", "1e-3", "--keep-best"]
    found = {}
    for name, (ranks, layout) in {"one": (1, []), **LAYOUTS}.items():
        save = ["--save", str(tmp_path / name), "--save-interval", "100"]
        assert train(*flags, *load, *save, *layout, flags=ON_CHAT, world_size=ranks) is None
        found[name] = [*metrics_of(tmp_path / name).values(), *records_of(tmp_path / name, "valid")]
        assert sum(record.get("supervised tokens", 0) for record in found[name]) == chat["chat"]
    best = min((record["lm loss"], record["iteration"]) for record in records_of(tmp_path / "one", "valid"))
    for name in LAYOUTS:
        assert best_of(tmp_path / name) == (best[1], pytest.approx(best[0], rel=1e-5))
        for ours, one in zip(found[name], found["one"], strict=True):
            for what in ("lm loss", "grad norm", "supervised tokens", "halt loss", "token accuracy"):
                assert what not in one or ours[what] == pytest.approx(one[what], rel=1e-5), (name, what)
