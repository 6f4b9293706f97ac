"""Steps of datatrove's between reading and tokenizing."""

import json
import random
import sys

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_recursive.data import preprocess as preprocess_module
from megatron_recursive.data.preprocess import Options, preprocess
from megatron_recursive.data.tokenizer import load_tokenizer
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.errors import UserError
from tests.quotes import ROOT

RANDOM = random.Random(1)
WORDS = ["".join(RANDOM.choices("abcdefghij", k=6)) for _ in range(200)]
ORIGINALS = [
    f"It stands by the {'river' if n % 5 else 'sea'} " + " ".join(RANDOM.choices(WORDS, k=80)) for n in range(30)
]
COPIES = [text.replace("stands", "sits") + " Indeed." for text in ORIGINALS[::3]]
STEPS = """
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.formatters.base import BaseFormatter

class Shout(BaseFormatter):
    name = "shout"
    def format(self, text):
        return text.upper()

def steps(around):
    return [LambdaFilter(lambda document: "river" not in document.text), Shout()]

def nothing(around):
    return None
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) for text in [*ORIGINALS, *COPIES]]
    (folder / "train.jsonl").write_text("\n".join([*lines[:5], "{", *lines[5:]]))
    train_tokenizer_lines = folder / "clean.jsonl"
    train_tokenizer_lines.write_text("\n".join(lines))
    train_tokenizer([train_tokenizer_lines], folder / "tok", 320)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of steps, entered."""
    (tmp_path / "own_steps.py").write_text(STEPS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(preprocess_module, "SMALL_BYTES", 0)
    yield tmp_path
    sys.modules.pop("own_steps", None)


def made(corpus, prefix, pipeline, **more):
    options = Options(pipeline=pipeline, on_error="skip", part_bytes=3000)
    summary = preprocess([corpus / "train.jsonl"], prefix, corpus / "tok", options=options, **more)
    tokenizer, dataset = load_tokenizer(corpus / "tok"), IndexedDataset(str(prefix))
    return summary, [tokenizer.decode(dataset[i][:-1]) for i in range(len(dataset))]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.grid)])
def test_steps_of_a_module_filter_and_change_what_is_tokenized(corpus, here, workers):
    summary, texts = made(corpus, here / "x", "own_steps:steps", workers=workers)
    assert texts == [text.upper() for text in [*ORIGINALS, *COPIES] if "river" not in text]
    assert summary.skipped == 1 and "train.jsonl:6 is not valid JSON" in summary.statistics.malformed[0]["first"]
    with pytest.raises(UserError, match="is there already, made of other documents"):
        made(corpus, here / "x", None)
    (here / "own_steps.py").write_text(STEPS.replace("upper", "lower"))
    with pytest.raises(UserError, match="is there already, made of other documents"):
        made(corpus, here / "x", "own_steps:steps")


def test_the_example_leaves_out_near_duplicates_of_other_parts(corpus, here, monkeypatch):
    monkeypatch.chdir(ROOT)
    summary, texts = made(corpus, here / "x", "examples.data.minhash:without_duplicates")
    assert summary.documents == len(ORIGINALS) and summary.skipped == 1
    kept = {text.replace("sits", "stands").removesuffix(" Indeed.") for text in texts}
    assert kept == set(ORIGINALS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_steps", "own_steps must be MODULE:FUNCTION, the module in"),
        ("no_steps:steps", "no_steps:steps must be MODULE:FUNCTION, the module in"),
        ("own_steps:none", "own_steps:none must be a function that returns a list of datatrove's steps"),
        ("own_steps:nothing", "must be a function that returns a list"),
    ],
)
def test_a_name_of_no_steps_is_refused(corpus, here, name, said):
    with pytest.raises(UserError, match=said):
        made(corpus, here / "x", name)
