"""The tokenizer of a conversion: the donor's ids, stop tokens, templates, whatever model and class it stands beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_recursive.errors import UserError
from tests.distributed import run_distributed
from tests.unit_tests.hf.donors import VOCAB, save_donor
from tests.unit_tests.inference.folders import write_tokenizer
from tests.unit_tests.training.runs import train

DIGITS_BY_THREE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]


def _write_tokenizer(folder: Path, given_class: str) -> None:
    """One whose digits go by three, of a class that would build another pre-tokenizer; and all that may lie beside."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *alphabet])}
    merges = [("1", "2"), ("3", "4"), ("12", "34"), ("5", "6"), ("7", "8"), ("56", "78")]
    vocabulary.update({a + b: len(vocabulary) + number for number, (a, b) in enumerate(merges)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(DIGITS_BY_THREE), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("plain{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools{{ tools[0].function.name }}")
    for name in ("tekken.json", "tokenizer.model.v3", "tokenization_own.py", "weights.bin"):
        (folder / name).write_text("{}")
    _change(folder / "tokenizer_config.json", tokenizer_class=given_class)


def _change(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**values, **changes}))


def _seen(folder: Path) -> list[Any]:
    """What a user of the folder gets."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=TOOLS, tokenize=False)
    return [tokenizer("1234 5678 12345678 don't\n\n  x<|pad|> y")["input_ids"], said, tokenizer.pad_token_id]


def _import(donor: Path, place: Path, **recursion: Any) -> list[str]:
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model

    heard: list[str] = []
    import_model(str(donor), str(place / "ckpt"), ImportOptions(recursion), heard.append)
    return heard


def _resized(donor: Path, place: Path, tokenizer: str | None = None) -> list[str]:
    from megatron_recursive.hf.convert.donor_import import ImportOptions, import_model
    from megatron_recursive.hf.convert.export import export_model

    heard: list[str] = []
    options = ImportOptions({"enable_recursive_refinement": False}, resize_vocab=tokenizer or True)
    import_model(str(donor), str(place / "ckpt"), options, heard.append)
    export_model(str(place / "ckpt"), str(place / "hf"), say=heard.append)
    return heard


def _export(checkpoint: Path, target: Path) -> None:
    from megatron_recursive.hf.convert.export import export_model

    export_model(str(checkpoint), str(target), say=lambda _: None)


def _there_and_back(donor: Path, place: Path, tokenizer: str | None = None, **recursion: Any) -> list[str]:
    from megatron_recursive.hf.convert.export import export_model

    heard = _import(donor, place, **recursion)
    export_model(str(place / "ckpt"), str(place / "hf"), tokenizer, say=heard.append)
    return heard


@pytest.mark.parametrize(
    ("kind", "given_class", "knobs"),
    [("olmo2", "GPT2Tokenizer", {"num_refinement_blocks": 2, "num_latent_refinements": 1}),
     ("qwen2", "LlamaTokenizerFast", {"enable_recursive_refinement": False})],
)  # fmt: skip
def test_ids_and_templates_stay_the_donors(kind: str, given_class: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    donor = save_donor(kind, tmp_path / "donor", vocab_size=300, eos_token_id=[0, 293])
    _write_tokenizer(donor, given_class)
    (donor / "generation_config.json").write_text('{"temperature": 0.6, "_from_model_config": true}')
    run_distributed(_there_and_back, 1, donor, tmp_path, timeout=200, **knobs)
    expected = _seen(donor)
    assert _seen(tmp_path / "ckpt/tokenizer") == _seen(tmp_path / "hf") == expected and expected[1] == "toolsf"
    files = ("config.json", "generation_config.json")
    config, settings = (json.loads((tmp_path / "hf" / file).read_text()) for file in files)
    assert config["eos_token_id"] == settings["eos_token_id"] == [0, 293] and settings["temperature"] == 0.6
    assert "_from_model_config" not in settings
    beside = {file.name for file in (tmp_path / "ckpt/tokenizer").iterdir()}
    assert {"tekken.json", "tokenizer.model.v3"} < beside and not beside & {"tokenization_own.py", "weights.bin"}


@pytest.mark.parametrize("says", ["nothing", "a settings file"])
def test_ids_beyond_the_vocabulary_stay_out(says: str, tmp_path: Path) -> None:
    """The tokenizer has a padding token that the donor's embedding has no row for; its config.json says -1."""
    donor = save_donor("olmo2", tmp_path / "donor", vocab_size=263, eos_token_id=[0, 263], pad_token_id=None)
    _write_tokenizer(donor, "PreTrainedTokenizerFast")
    (donor / "generation_config.json").unlink()
    if says == "a settings file":
        (donor / "generation_config.json").write_text('{"pad_token_id": 263, "eos_token_id": [0, 263], "top_k": 7}')
    _change(donor / "config.json", pad_token_id=-1)
    assert _seen(donor)[-1] == 263
    run_distributed(_there_and_back, 1, donor, tmp_path, timeout=200, enable_recursive_refinement=False)
    for file in ("ckpt/tokenizer/generation_config.json", "hf/generation_config.json", "hf/config.json"):
        found = json.loads((tmp_path / file).read_text())
        assert found.get("pad_token_id") is None and found["eos_token_id"] == [0], file


def test_a_class_that_would_change_the_ids_is_not_exported_to(tmp_path: Path) -> None:
    donor, own = save_donor("qwen2", tmp_path / "donor", vocab_size=300), tmp_path / "own"
    own.mkdir()
    _write_tokenizer(own, "PreTrainedTokenizerFast")
    plain = {"enable_recursive_refinement": False}
    (heard,) = run_distributed(_there_and_back, 1, donor, tmp_path, str(own), timeout=200, **plain)
    assert _seen(tmp_path / "hf") == _seen(own)
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "recursive_gpt"
    assert any("other ids beside a Qwen2ForCausalLM" in line for line in heard)


def test_a_tokenizer_that_says_otherwise_is_refused(tmp_path: Path) -> None:
    from megatron_recursive.hf.convert.tokenizer_files import prove_ids, tokenizer_of

    (tmp_path / "a").mkdir()
    _write_tokenizer(tmp_path / "a", "PreTrainedTokenizerFast")
    write_tokenizer(tmp_path / "b")
    with pytest.raises(UserError, match="tokenizer of donor would change .*ids of a text are now"):
        prove_ids(tokenizer_of(tmp_path / "a"), tmp_path / "b", "donor")
    assert prove_ids(None, tmp_path / "b", "donor") == (
        "the tokenizer of donor does not load here, so that its ids are unproven."
    )


# --- what an import says of its donor ---------------------------------------------------------------------------------


def _taught(folder: Path) -> Path:
    """A donor that knows the text of the proof; its vocabulary lacks the tokenizer's last ids."""
    from megatron_recursive.hf.convert.proof import proof_text
    from tests.unit_tests.hf.donors import make_donor

    model = make_donor("llama3, head_dim", initializer_range=0.2).train()
    ids = proof_text(VOCAB, write_tokenizer(folder), 64).tokens_BS[:1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_an_import_says_what_it_does_to_the_donor(tmp_path: Path) -> None:
    donor = _taught(tmp_path / "donor")
    knobs = {"num_refinement_blocks": 2, "num_latent_refinements": 1}
    (heard,) = run_distributed(_import, 1, donor, tmp_path, timeout=200, **knobs)
    summary = json.loads((tmp_path / "ckpt/conversion.json").read_text())["summary"]["loss"]
    before, plain, recursive = summary.values()
    assert list(summary) == ["donor", "imported without recursion", "imported with recursion"]
    assert before == pytest.approx(plain, abs=1e-3) and before < 1 < recursive - 1
    said = "\n".join(heard)
    assert f"starts at a loss of {recursive:.2f} where its donor has {before:.2f}" in said
    assert "has ids up to 256, but the model's vocabulary ends at 250" in said
    (line,) = (line for line in said.splitlines() if " pretrain " in line)
    assert f"--load {tmp_path}/ckpt --save {tmp_path}/ckpt-trained --data-path" in line and "--lr" not in line
    assert {"--bf16", "--seq-length=64", "--lr=1e-4"} < set((tmp_path / "ckpt/megatron_args.txt").read_text().split())


def test_an_embedding_grows_to_the_ids_of_the_tokenizer(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    donor = save_donor("olmo2", tmp_path / "donor")
    write_tokenizer(donor)
    (heard,) = run_distributed(_resized, 1, donor, tmp_path, timeout=200)
    assert not any("vocabulary ends" in line for line in heard)
    before, after = (load_file(folder / "model.safetensors") for folder in (donor, tmp_path / "hf"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == (257, 60) and torch.equal(after[name][:VOCAB], before[name])
        torch.testing.assert_close(after[name][VOCAB:], before[name].mean(0).expand(6, -1))


@pytest.mark.grid
def test_a_model_that_was_trained_on_conversations_ends_where_its_turns_do(tmp_path: Path) -> None:
    """Its donor, a base model, knows the template and the end of documents alone."""
    from megatron_recursive.data.chat.options import ChatOptions
    from megatron_recursive.data.preprocess import Options, preprocess

    donor = save_donor("olmo2", tmp_path / "donor", eos_token_id=0, pad_token_id=0)
    tokenizer = write_tokenizer(donor)
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|turn|>{% endfor %}<assistant>"
    tokenizer.save_pretrained(donor)
    run_distributed(_resized, 1, donor, tmp_path, timeout=200)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == 0
    turns = [{"instruction": "a", "output": "b"}] * 4
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    preprocess([tmp_path / "in.jsonl"], tmp_path / "data", donor, options=Options(chat=ChatOptions()))
    flags = "--train-epochs 1 --split 1,0,0 --eval-iters 0 --seq-length 32 --finetune --num-workers 0".split()
    argv = [f"@{tmp_path / 'ckpt/megatron_args.txt'}", "--chat-data", tmp_path / "data", *flags, "--load",
            tmp_path / "ckpt", "--save", tmp_path / "run"]  # fmt: skip
    assert train(*argv, flags=(), recursion=()) is None
    run_distributed(_export, 1, tmp_path / "run", tmp_path / "chat")
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "chat" / name).read_text())["eos_token_id"] == [0, 257], name


@pytest.mark.grid
def test_the_embedding_grows_for_the_tokens_of_the_default_chat_template(tmp_path: Path) -> None:
    """The tokenizer that prepare-chat has added to takes the place of the donor's; another one is refused."""
    from safetensors.torch import load_file

    from megatron_recursive.data.chat.templates import DEFAULT, TOKENS, store_chat_tokenizer
    from megatron_recursive.data.tokenizer import TokenizerChoice

    donor = save_donor("olmo2", tmp_path / "donor")
    write_tokenizer(donor)
    (donor / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 1}')
    stored = store_chat_tokenizer(TokenizerChoice(str(donor)), tmp_path / "data")
    assert stored.id_range == 257 + len(TOKENS)
    (other := tmp_path / "other").mkdir()
    _write_tokenizer(other, "PreTrainedTokenizerFast")
    with pytest.raises(Exception, match="is another tokenizer than"):
        run_distributed(_resized, 1, donor, tmp_path / "bad", str(other), timeout=200)
    assert not (tmp_path / "bad/ckpt").exists()
    run_distributed(_resized, 1, donor, tmp_path, str(stored.file.parent), timeout=200)
    for folder in (tmp_path / "ckpt/tokenizer", tmp_path / "hf"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        assert tokenizer.convert_tokens_to_ids(TOKENS[0]) == 257 and tokenizer.chat_template == DEFAULT
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings["temperature"] == 0.6
        assert settings["eos_token_id"] == [1, tokenizer.convert_tokens_to_ids("<|endassistant|>")]  # a turn's
    before, after = (load_file(folder / "model.safetensors") for folder in (donor, tmp_path / "hf"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(after[name][VOCAB:], before[name].mean(0).expand(257 + len(TOKENS) - VOCAB, -1))
