"""tools/generate.py on Hugging Face folders: what it answers, shows and refuses."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, processors

from megatron_recursive.commands import parser_of
from megatron_recursive.errors import UserError
from megatron_recursive.inference import command, output
from megatron_recursive.inference.generation import encode_prompt
from megatron_recursive.inference.loading import open_model
from tests.distributed import REPOSITORY, run_command
from tests.unit_tests.inference.folders import POSITIONS, TEMPLATE, write_plain, write_recursive


@pytest.fixture(scope="module")
def recursive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recursive(tmp_path_factory.mktemp("recursive"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain"))


def run(*argv: Any) -> None:
    command.run(parser_of("generate").parse_args([str(each) for each in argv]))


def records(capsys: pytest.CaptureFixture[str], *argv: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    run(*argv)
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def refusal(*argv: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(*argv)
    return str(caught.value)


def test_greedy_is_the_arg_max_of_full_forwards(recursive: Path, plain: Path, capsys: Any) -> None:
    for folder in (recursive, plain):
        (record,) = records(capsys, "--model", folder, "--prompt", "hello", "--max-tokens", 8, "--json")
        with open_model(str(folder)) as loaded, torch.no_grad():
            tokens = loaded.text.encode("hello")
            for token in record["tokens"]:
                assert token == int(loaded.model(torch.tensor([tokens])).logits[0, -1].argmax())
                tokens.append(token)
            assert loaded.text.decode(tokens) == "hello" + record["text"]
        assert record["prompt_tokens"] == 5 and record["prompt"] == "hello"
        assert record["finish_reason"] == ("stop" if record["tokens"][-1] == 0 else "length")


def test_the_device_is_the_one_that_is_asked_for(recursive: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model", recursive, "--prompt", "ab", "--max-tokens", 2, "--json"]
    without_gpu = r"cannot use its .*CUDA device: .*; mend that, or give --device cpu to run on CPUs\.$"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(without_gpu, refusal(*flags, "--device", "cuda"))
    monkeypatch.setenv("MEGATRON_RECURSIVE_DEVICE", "cuda")
    assert re.search(without_gpu, refusal(*flags))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that is listed and runs nothing
    assert "CUDA device 0: " in refusal(*flags, "--device", "auto")
    (record,) = records(capsys, *flags, "--device", "cpu")
    assert len(record["tokens"]) == 2


def test_sampling_repeats_with_the_seed_alone(recursive: Path, capsys: Any) -> None:
    flags = ["--model", recursive, "--prompt", "ab", "--max-tokens", 12, "--json", "--temperature", 2.0, "--top-k", 40,
             "--top-p", 0.95, "--repetition-penalty", 1.2]  # fmt: skip
    texts = [[r["tokens"] for r in records(capsys, *flags, *more)] for more in (
        [], ["--prompt", "x", "--prompt", "ab"], ["--seed", 1])]  # fmt: skip
    assert texts[1][0] == texts[1][2] == texts[0][0] != texts[2][0]


def test_an_end_that_the_tokenizer_appends_is_no_part_of_a_prompt(tmp_path: Path, recursive: Path) -> None:
    folder = shutil.copytree(recursive, tmp_path / "ends")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("$A <|end|>", special_tokens=[("<|end|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with open_model(str(folder)) as ends, open_model(str(recursive)) as plain:
        assert ends.text.encode("ab")[-1] == 0
        for prompt in ("ab", "", "ab<|end|>"):  # the last one is the prompt's own
            assert encode_prompt(ends, prompt) == encode_prompt(plain, prompt)


def test_beams_are_at_least_as_likely_as_greedy(recursive: Path, capsys: Any) -> None:
    found = []
    for beams in (1, 4):
        flags = ["--model", recursive, "--prompt", "abc", "--max-tokens", 6, "--json", "--num-beams", beams]
        (record,) = records(capsys, *flags)
        with open_model(str(recursive)) as loaded, torch.no_grad():
            prompt = loaded.text.encode("abc")
            logits = loaded.model(torch.tensor([prompt + record["tokens"]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1)[torch.arange(len(record["tokens"])), record["tokens"]]
        found.append(float(chosen.mean()))
    assert found[1] >= found[0] - 1e-6


def test_every_block_is_shown_for_every_new_token(recursive: Path, capsys: Any) -> None:
    flags = ["--model", recursive, "--prompt", "abc", "--max-tokens", 5, "--show-recursive-steps"]
    *steps, result = records(capsys, *flags)
    assert [step["token"] for step in steps] == result["tokens"] and [s["step"] for s in steps] == [1, 2, 3, 4, 5]
    with open_model(str(recursive)) as loaded, torch.no_grad():
        prompt = loaded.text.encode("abc")
        full = loaded.model(torch.tensor([prompt + result["tokens"]]), output_blocks=True)
    for number, step in enumerate(steps):
        place = len(prompt) - 1 + number
        probabilities = full.block_logits[:, 0, place].softmax(-1)
        assert [block["token"] for block in step["blocks"]] == probabilities.argmax(-1).tolist()
        names = ("probability", "said_probability", "halting_probability")
        shown = torch.tensor([[block[name] for name in names] for block in step["blocks"]])
        true = [probabilities.amax(-1), probabilities[:, step["token"]], full.block_halting[:, 0, place]]
        assert torch.allclose(shown, torch.stack(true, dim=1), atol=1e-5)


def test_an_exit_shows_the_blocks_that_were_run_and_says_what_it_saved(recursive: Path, capsys: Any) -> None:
    *steps, result = records(capsys, "--model", recursive, "--prompt", "abc", "--max-tokens", 12, "--exit", "halting",
                             "--show-recursive-steps")  # fmt: skip
    taken = [len(step["blocks"]) for step in steps]
    assert set(taken) > {1} and 0 < result["flops_saved"] < 1 and 1 < result["mean_blocks"] < 3
    assert sum(result["blocks"].values()) == 3 + 12 - 1  # the last token is never fed
    for step in steps:
        *before, last = [block["halting_probability"] for block in step["blocks"]]
        assert all(p < 0.5 for p in before) and (last >= 0.5 or len(step["blocks"]) == 3)
    (capped,) = records(capsys, "--model", recursive, "--prompt", "abc", "--max-tokens", 12, "--exit", "kl",
                        "--max-inference-refinement-steps", 1, "--json")  # fmt: skip
    (fewer,) = records(capsys, "--model", recursive, "--prompt", "abc", "--max-tokens", 12, "--json",
                       "--num-refinement-blocks", 1)  # fmt: skip
    assert capped["mean_blocks"] == 1 and capped["tokens"] == fewer["tokens"] != result["tokens"]


def test_a_terminal_gets_words_as_they_come_and_a_table(recursive: Path, capsys: Any, monkeypatch: Any) -> None:
    flags = ["--model", recursive, "--prompt", "abc", "--max-tokens", 4]
    (record,) = records(capsys, *flags, "--json")
    written: list[str] = []
    monkeypatch.setattr(output, "write", written.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run(*flags)
    assert len(written) > 1 and "".join(written) == record["text"]
    assert capsys.readouterr().out == "abc\n"  # the words went to _write
    run(*flags, "--show-recursive-steps", "--exit", "halting")
    head, *rows, said = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["step", "token", "block", "1:"] and said.startswith("abc")
    assert [int(row.split()[0]) for row in rows if not row.startswith("step")] == [1, 2, 3, 4]


def test_files_of_prompts(recursive: Path, tmp_path: Path, capsys: Any) -> None:
    lines, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("one\n\ntwo\n")
    objects.write_text('{"prompt": "one"}\n{"prompt": "two", "id": 3}\n')
    flags = ["--model", recursive, "--max-tokens", 3, "--json"]
    answers = [records(capsys, *flags, "--prompt-file", file) for file in (lines, objects)]
    found = [[(record["prompt"], record["tokens"]) for record in each] for each in answers]
    assert found[0] == found[1] and [prompt for prompt, _ in found[0]] == ["one", "two"]
    lines.write_bytes("\ufeffone\r\nform\x0cfeed\u2028\x85\n".encode())
    objects.write_bytes('\ufeff{"prompt": "one"}\n{"prompt": "form\\ffeed\u2028\x85"}\r\n'.encode())
    for file in (lines, objects):
        read = [record["prompt"] for record in records(capsys, "--model", recursive, "--json", "--prompt-file", file)]
        assert read == ["one", "form\x0cfeed\u2028\x85"]
    run("--model", recursive, "--max-tokens", 3, "--prompt", "one")
    with open_model(str(recursive)) as loaded:
        assert capsys.readouterr().out == f"one{loaded.text.decode(found[0][0][1])}\n"


BATCHES: dict[str, list[Any]] = {
    "fixed depth": [],
    "halting": ["--exit", "halting", "--halt-threshold", 0.45],
    "argmax": ["--exit", "argmax"],
    "beams": ["--num-beams", 2],
}


@pytest.mark.parametrize("way", BATCHES)
def test_a_batch_says_what_its_prompts_say_one_by_one(way: str, recursive: Path, tmp_path: Path, capsys: Any) -> None:
    """Also where a prompt leaves less room than the others, ends early, or is cut."""
    file = tmp_path / "prompts.txt"
    longest = "x" * (POSITIONS - 3)
    file.write_text(f"a\nlonger than that\nof twelve\n{longest}\nbcd\nthe last of them, of 30 tokens\n")
    flags = ["--model", recursive, "--prompt-file", file, "--max-tokens", 10, "--json", *BATCHES[way]]
    alone = records(capsys, *flags)
    for size in (4, 16):
        together = records(capsys, *flags, "--batch-size", size)
        for name in ("prompt", "text", "tokens", "prompt_tokens", "finish_reason"):
            assert [record[name] for record in together] == [record[name] for record in alone], name
        assert [record.get("batch_size", 1) for record in together] == [3, 3, 3, 1, 2, 2]
    if way == "halting":
        assert len({record["mean_blocks"] for record in alone}) > 1 and together[0]["mean_blocks"] > 1
    capsys.readouterr()
    run(*(flag for flag in flags if flag != "--json"), "--batch-size", 4)
    heard = capsys.readouterr()
    assert heard.out == "".join(record["prompt"] + record["text"] + "\n" for record in alone)
    assert heard.err.count(" of 6: ") == 6


def test_a_model_spread_over_devices_says_the_same(recursive: Path, capsys: Any) -> None:
    flags = ["--model", recursive, "--prompt", "abc", "--prompt", "a", "--batch-size", 2, "--exit", "kl", "--json"]
    expected = [record["tokens"] for record in records(capsys, *flags)]
    assert [record["tokens"] for record in records(capsys, *flags, "--device-map", "auto")] == expected
    assert "leave out --device cpu" in refusal(*flags, "--device-map", "auto", "--device", "cpu")


def test_names_in_the_hubs_cache(recursive: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """With and without an organisation; of a model, of a tokenizer, and of neither."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = ["--prompt", "abc", "--max-tokens", 4, "--json"]
    expected = records(capsys, *flags, "--model", recursive)[0]["tokens"]
    for name in ("tiny", "some/tiny"):
        cached = tmp_path / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        shutil.copytree(recursive, cached / "snapshots" / ("0" * 40))
        assert records(capsys, *flags, "--model", name)[0]["tokens"] == expected
        assert records(capsys, *flags, "--model", recursive, "--tokenizer", name)[0]["tokens"] == expected
    said = refusal(*flags, "--model", "absent")
    assert said == "absent is neither a folder nor complete in the hub's cache; fetch it with: hf download absent"
    said = refusal(*flags, "--model", recursive, "--tokenizer", "absent")
    assert said.startswith("tokenizer absent is neither a folder nor in the hub's cache; fetch it with hf download")


def test_settings_without_an_end_leave_that_of_tokenizer_and_config(
    recursive: Path, plain: Path, tmp_path: Path, capsys: Any
) -> None:
    from transformers import AutoTokenizer

    from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM

    flags = ["--prompt", "abc", "--max-tokens", 5, "--json"]
    for source in (recursive, plain):
        folder, tokens = tmp_path / source.name, records(capsys, *flags, "--model", source)[0]["tokens"]
        shutil.copytree(source, folder)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[2])
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text('{"top_k": 7}')
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
        (record,) = records(capsys, *flags, "--model", folder)
        assert record["tokens"] == tokens[: tokens.index(tokens[2]) + 1] and record["finish_reason"] == "stop"
    (tmp_path / recursive.name / "config.json").write_text((recursive / "config.json").read_text())
    model = RecursiveGPTForCausalLM.from_pretrained(tmp_path / recursive.name)
    assert (model.generation_config.eos_token_id, model.generation_config.top_k) == (0, 7)


def test_short_empty_and_long_prompts(recursive: Path, capsys: Any) -> None:
    empty, short = records(capsys, "--model", recursive, "--prompt", "", "--prompt", "a", "--max-tokens", 2, "--json")
    assert empty["prompt_tokens"] == short["prompt_tokens"] == 1  # an empty prompt starts from the end-of-text token
    capsys.readouterr()
    run("--model", recursive, "--prompt", "a" * (POSITIONS - 3), "--json", "--repetition-penalty", 1.5)
    heard = capsys.readouterr()
    assert len(json.loads(heard.out)["tokens"]) <= 3 and f"leaves 3 of the {POSITIONS} positions" in heard.err
    said = refusal("--model", recursive, "--prompt", "fine", "--prompt", "a" * POSITIONS)
    assert said.startswith(f"--prompt 2 has {POSITIONS} tokens") and capsys.readouterr().out == ""


def test_a_conversation_uses_the_chat_template(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    said = []
    for template in (TEMPLATE, None):
        folder = write_recursive(tmp_path / str(bool(template)), template)
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n" + "x" * POSITIONS + "\n/reset\nhi\n"))
        run("--model", folder, "--interactive", "--max-tokens", 4)
        heard = capsys.readouterr()
        assert ("no chat template" in heard.err) == (template is None) and "The turn was dropped" in heard.err
        said.append(heard.out)
        with open_model(str(folder)) as loaded:
            ids = loaded.text.encode("<user>hi<assistant>" if template else "hi")
            tokens = loaded.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :]
            answer = loaded.text.decode(tokens.tolist())
        assert heard.out == f"{answer}\n" * 2
    assert said[0] != said[1]


@pytest.mark.parametrize(("flags", "sentence"), [
    ([], "There is nothing to answer"),
    (["--prompt", "a", "--max-tokens", 0], "--max-tokens must be at least 1"),
    (["--prompt", "a", "--top-p", 1.5], "--top-p must lie above 0"),
    (["--prompt", "a", "--temperature", 0, "--top-k", 3], "--top-k samples"),
    (["--prompt", "a", "--halt-threshold", 0.5], "--halt-threshold belongs to an exit"),
    (["--prompt", "a", "--exit", "halting", "--halt-threshold", 1.5], "--halt-threshold must lie strictly between"),
    (["--prompt", "a", "--exit", "halting", "--exit-threshold", 0.1], "read --exit-threshold; give --halt-threshold,"),
    (["--prompt", "a", "--num-refinement-blocks", 0], "--num-refinement-blocks must be at least 1"),
    (["--prompt", "a", "--show-recursive-steps", "--num-beams", 2], "--show-recursive-steps follows one sequence"),
    (["--prompt", "a", "--interactive"], "--interactive reads what you type"),
    (["--prompt-file", "missing.txt"], "--prompt-file missing.txt cannot be read"),
    (["--prompt", "a", "--tokenizer", "./missing"], "./missing"),
    (["--prompt", "a", "--batch-size", 0], "--batch-size must be at least 1"),
    (["--prompt", "a", "--batch-size", 2, "--show-recursive-steps"], "follow one sequence; leave out --batch-size"),
])  # fmt: skip
def test_refusals(recursive: Path, flags: list[Any], sentence: str) -> None:
    said = refusal("--model", recursive, *flags)
    assert sentence in said and said.count(". ") == 0, said


def test_what_a_plain_model_cannot_do_is_refused(plain: Path, tmp_path: Path) -> None:
    for flags in (["--exit", "kl"], ["--show-recursive-steps"], ["--num-refinement-blocks", 2]):
        assert f"{flags[0]}" in (said := refusal("--model", plain, "--prompt", "a", *flags)) and "plain one" in said
    assert "neither a Hugging Face folder" in refusal("--model", tmp_path, "--prompt", "a")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "a"}\n')
    assert "line 2," in refusal("--model", plain, "--prompt-file", bad)


def test_a_missing_or_wrong_tokenizer_and_files_that_are_no_model(plain: Path, tmp_path: Path) -> None:
    own = "with --tokenizer"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((plain / name).read_bytes())
    assert own in (said := refusal("--model", tmp_path, "--prompt", "a")) and "train_tokenizer" not in said
    (tmp_path / "generation_config.json").write_text("[")
    assert "generation_config.json is not JSON" in refusal("--model", tmp_path, "--prompt", "a", "--tokenizer", plain)
    large = Tokenizer(models.WordLevel({f"w{number}": number for number in range(400)}, "w300"))
    large.save(str(tmp_path / "tokenizer.json"))
    said = refusal("--model", plain, "--prompt", "anything", "--tokenizer", tmp_path)
    assert "holds the token id 300, but" in said and "has a vocabulary of 257" in said and own in said
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    said = refusal("--model", gguf, "--prompt", "a")
    assert "is a GGUF file, which is imported first" in said and f"import --hf {gguf}" in said
    assert "is a file" in refusal("--model", tmp_path / "config.json", "--prompt", "a")


@pytest.mark.grid
def test_the_command_writes_plain_lines_where_there_is_no_terminal(recursive: Path) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "generate.py")]
    done = run_command([*tool, "--prompt", "ab", "--max-tokens", "2", "--model", str(recursive)], timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("ab") and done.stdout.count("\n") == 1
    assert done.stderr.startswith("[1 of 1: 2 tokens, ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.grid
def test_the_command_ends_with_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "generate.py")]
    done = run_command([*tool, "--prompt", "a", "--model", str(tmp_path / "none")], timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: --model") and "Traceback" not in done.stderr
