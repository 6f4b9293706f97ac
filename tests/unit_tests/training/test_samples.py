"""--generate-interval: what is printed, and that training does not notice."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.grids import grid
from tests.unit_tests.training.runs import FLAGS, RECURSION, in_worker, metrics_of, save_to, train

SAMPLES = ["--train-iters", "4", "--generate-interval", "2", "--generation-prompt", "1 2 3", "--generation-prompt", "",
           "--generation-tokens", "4"]  # fmt: skip
LAYOUTS = {
    "one process": (1, []),
    "TP 2, sequence-parallel": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "PP 2": (2, ["--pipeline-model-parallel-size", "2"]),
    "late gather": (2, ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]),
}


def _listen(argv: list[str]) -> tuple[str | None, list[str]]:
    """Train in a worker; the refusal, and this rank's lines about samples."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        said = in_worker(argv)
    return said, [line for line in heard.getvalue().splitlines() if line.startswith("sample at")]


def _continue_checkpoint(folder: str, prompts: list[list[int]]) -> list[list[int]]:
    """The same samples from the saved checkpoint, in one process."""
    import torch

    from megatron_recursive.inference.megatron_model import open_megatron

    with open_megatron(folder) as (model, _):
        answers = []
        for prompt in prompts:
            tokens = list(prompt)
            while len(tokens) < len(prompt) + 4 and 126 not in tokens[len(prompt) :]:
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            answers.append(tokens[len(prompt) :])
        return answers


@pytest.mark.parametrize("layout", grid(LAYOUTS, quick=["one process"]))
def test_samples_are_the_models_and_training_does_not_notice(layout: str, tmp_path: Path) -> None:
    """Dropout is on (Megatron's default), so that a random number drawn in between would show."""
    ranks, flags = LAYOUTS[layout]
    assert train(*save_to(tmp_path / "quiet", 4), "--train-iters", "4", *flags, world_size=ranks) is None
    argv = [*FLAGS, *RECURSION, *flags, *save_to(tmp_path / "loud", 4), *SAMPLES]
    results = run_distributed(_listen, ranks, argv, timeout=120)
    assert results[0][0] is None and not any(lines for _, lines in results[1:])
    quiet, loud = metrics_of(tmp_path / "quiet"), metrics_of(tmp_path / "loud")
    assert loud.keys() == quiet.keys() and len(quiet) == 4
    assert [_numbers(loud[i]) for i in loud] == [_numbers(quiet[i]) for i in quiet]

    heard = [re.fullmatch(r"sample at iteration (\d+): '(.*)' -> '(.*)'", line) for line in results[0][1]]
    assert [(found[1], found[2]) for found in heard if found] == [(i, p) for i in "24" for p in ("1 2 3", "")]
    (expected,) = run_distributed(_continue_checkpoint, 1, str(tmp_path / "loud"), [[1, 2, 3], [126]])
    assert [[int(each) for each in found[3].split()] for found in heard[2:] if found] == expected


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if "time" not in name and "per second" not in name}


def _of_a_user() -> tuple[list[list[int]], list[int]]:
    from argparse import Namespace

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from megatron_recursive.training.samples import _end_ids, encode_prompts

    words = {word: number for number, word in enumerate(["?", "user", "assistant", ":", "hello", "there", "<over>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner)
    fast.add_tokens(["<over>"], special_tokens=True)
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }}<over> {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    run = Namespace(generation_prompt=["hello there"], chat_data="prefix", seq_length=16, padded_vocab_size=7)
    tokenizer = Namespace(_tokenizer=Namespace(tokenizer=fast), eod=0)
    assert _end_ids(run, tokenizer) == [0, words["<over>"]]  # whatever stands behind it in the data
    return encode_prompts(run, tokenizer), [words[word] for word in "user : hello there <over> assistant :".split()]


def test_with_conversations_a_prompt_is_what_a_user_says() -> None:
    ((encoded, expected),) = run_distributed(_of_a_user, 1)
    assert encoded == [expected]


def _of_one_that_ends_texts() -> list[list[int]]:
    from argparse import Namespace

    from megatron_recursive.training.samples import encode_prompts

    run = Namespace(generation_prompt=["1 2", ""], chat_data=None, tokenizer_type="HuggingFaceTokenizer", seq_length=8,
                    padded_vocab_size=7)  # fmt: skip
    return encode_prompts(run, Namespace(tokenize=lambda text: [*map(int, text.split()), 0], eod=0))


def test_an_end_that_the_tokenizer_appends_is_no_part_of_a_prompt() -> None:
    assert run_distributed(_of_one_that_ends_texts, 1) == [[[1, 2], [0]]]


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--generate-interval", "2"], "--generate-interval needs --generation-prompt"),
    (["--generation-prompt", "1"], "--generation-prompt needs --generate-interval"),
    (["--generate-interval", "-1", "--generation-prompt", "1"], "--generate-interval must be 0"),
    ([*SAMPLES, "--generation-tokens", "0"], "--generation-tokens must be at least 1"),
    (["--generate-interval", "2", "--generation-prompt", "a b"], "cannot be read by the tokenizer"),
    (["--generate-interval", "2", "--generation-prompt", "1 " * 15 + "1"], "has 16 tokens"),
    (["--generate-interval", "2", "--generation-prompt", "1 999"], "of the model's vocabulary"),
])  # fmt: skip
def test_refusals(flags: list[str], sentence: str) -> None:
    said = train(*flags)
    assert said is not None and sentence in said and said.count(". ") == 0, said
