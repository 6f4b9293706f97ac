"""The habits of users of Megatron's own tools/preprocess_data.py: its flags, its names of files, its tokens."""

import argparse
import json
import re
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_recursive.commands import main, parser_of
from megatron_recursive.data.megatron_flags import MEGATRON_FLAGS
from megatron_recursive.data.tokenizer_training import train_tokenizer

GUIDE = Path(__file__).parents[3] / "RECURSIVE_GPT_IMPLEMENTATION_GUIDE.md"
SCRIPT = """--input --json-keys --split-sentences --keep-newlines --append-eod --lang --output-prefix --workers
    --find-optimal-num-workers --workers-to-check --max-documents --partitions --log-interval
    --keep-sequential-samples""".split()
RECORDS = [
    {"text": f"Document {n} says {'again and ' * (n % 7)}that the loss falls.", "title": f"No. {n}", "n": n}
    for n in range(50)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.json").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    train_tokenizer([folder / "a.json"], folder / "tok", 320)
    return folder


def tokenizer_parser():
    from megatron.training.arguments import _add_tokenizer_args

    return _add_tokenizer_args(argparse.ArgumentParser())


def run(folder, *words):
    main(["preprocess", "--input", str(folder / "a.json"), *map(str, words)])


def test_every_flag_of_the_script_has_one_answer_and_the_guide_tells_it():
    asked = {*SCRIPT, *tokenizer_parser()._option_string_actions} - {"-h", "--help"}
    answered = [name for _, names, _, _ in MEGATRON_FLAGS for name in names.split()]
    assert sorted(answered) == sorted(asked)
    assert asked <= set(parser_of("preprocess")._option_string_actions)
    rows = [f"| `{'` `'.join(names.split())}` | {how} | {answer} |" for how, names, _, answer in MEGATRON_FLAGS]
    section = GUIDE.read_text().partition("### Megatron's own flags")[2]
    assert re.findall(r"^\| `.*", section, re.MULTILINE)[: len(rows)] == rows


def written_by_megatron(folder, key):
    """What process_json_file of Megatron's script writes for a key."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tok")]
    args = tokenizer_parser().parse_args(words)
    for name, value in {"rank": 1, "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1}.items():
        setattr(args, name, value)
    tokenizer = build_tokenizer(args)
    prefix = folder / f"theirs_{key}_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for record in RECORDS:
        ids = [*tokenizer.tokenize(record[key]), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_a_command_of_megatrons_makes_the_files_that_its_script_makes(folder, capsys):
    run(folder, "--output-prefix", folder / "ours", "--json-keys", "text", "title", "--tokenizer-type",
        "HuggingFaceTokenizer", "--tokenizer-model", folder / "tok", "--append-eod", "--workers", 2, "--partitions", 2,
        "--log-interval", 100)  # fmt: skip
    told = capsys.readouterr()
    assert "--partitions has no effect here: parts are cut by size" in told.err and "--log-interval has" in told.err
    assert json.loads(told.out.splitlines()[-1])["documents"] == 100
    for key in ("text", "title"):
        theirs, ours = written_by_megatron(folder, key), folder / f"ours_{key}_document"
        for end in (".bin", ".idx"):
            assert theirs.with_suffix(end).read_bytes() == ours.with_suffix(end).read_bytes()
        assert len(IndexedDataset(str(ours))) == 50


def test_names_of_one_key(folder):
    tokenizer = ("--tokenizer", folder / "tok")
    run(folder, "--output-prefix", folder / "p", *tokenizer)
    run(folder, "--output", folder / "q", *tokenizer)
    run(folder, "--output", folder / "r", "--json-keys", "title", *tokenizer)
    names = {path.name for path in folder.glob("[pqr]*.idx")}
    assert names == {"p_text_document.idx", "q.idx", "r_title_document.idx"}
    assert (folder / "p_text_document.bin").read_bytes() == (folder / "q.bin").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--split-sentences"], "--split-sentences is not taken: sentences are for BERT and T5"),
        (["--find-optimal-num-workers"], "give as many --workers as"),
        (["--tokenizer-special-tokens", "<a>"], "add the tokens to the tokenizer's own folder"),
        (["--tokenizer-type", "NullTokenizer"], "--tokenizer-type NullTokenizer is none of HuggingFaceTokenizer"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "GPT2BPETokenizer needs --vocab-file and --merge-file"),
        (["--tokenizer-type", "Llama2Tokenizer"], "Llama2Tokenizer needs --tokenizer-model FILE.model"),
        (["--json-key", "text"], "give --json-key and --output for one dataset PREFIX, or --json-keys"),
        (["--json-keys", "text", "n"], "a.json:1 has a int under 'n'"),
        (["--hf-split", "train"], "--hf-config and --hf-split are for an --input hf://NAME"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(folder, capsys, words, said):
    with pytest.raises(SystemExit) as left:
        run(folder, "--output-prefix", folder / "none", "--tokenizer-model", folder / "tok", *words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1
    assert not list(folder.glob("none*"))
