"""An export under transformers' own server and chat: loaded by its code, at the depth and exit of its settings."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.hf.convert.export import AUTO_MAP
from megatron_recursive.hf.model import write_remote_code
from tests.unit_tests.inference.folders import write_recursive

pytestmark = pytest.mark.heavy

TRANSFORMERS = str(Path(sys.executable).parent / "transformers")
TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<|end|>{% endfor %}<a>"
SETTINGS = {"eos_token_id": 0, "repetition_penalty": 1.3, "num_refinement_blocks": 2, "exit": "halting"}
QUESTION = "what"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export all of whose tokens are letters."""
    folder = write_recursive(tmp_path_factory.mktemp("chat") / "small", TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    write_remote_code(folder)
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = {number: name for name, number in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] = {name if len(name) > 1 or name.isascii() else f"({number})": number
                                   for number, name in names.items()}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[int]:
    """The port at which it is served."""
    with contextlib.closing(socket.create_server(("localhost", 0))) as free:
        port = free.getsockname()[1]
    home, log = folder.parent, folder.parent / "log"
    command = [TRANSFORMERS, "serve", str(folder), "--trust-remote-code", "--device", "cpu", "--port", str(port)]
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, cwd=home, stdout=stream, stderr=stream, env=environment(home))
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port)):
                break
            time.sleep(1)
        yield port
    finally:
        process.kill()
        process.wait()


def environment(home: Path) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**others, "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def expected(folder: Path) -> list[str]:
    """The answer by the folder's settings, at another depth, and without the exit."""
    import torch
    from transformers import AutoTokenizer

    from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM

    tokenizer, model = AutoTokenizer.from_pretrained(folder), RecursiveGPTForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(f"<u>{QUESTION}<|end|><a>")["input_ids"]])
    answers = [model.generate(ids, max_new_tokens=8, do_sample=False, **other)[0, ids.shape[1] :]
               for other in ({}, {"num_refinement_blocks": 3}, {"exit": "none"})]  # fmt: skip
    return [tokenizer.decode(answer) for answer in answers]


def test_the_server_answers_at_the_depth_and_exit_of_the_folder(folder: Path, server: int) -> None:
    from openai import OpenAI
    from transformers import GenerationConfig

    whole, *others = expected(folder)
    assert len({whole, *others}) == 3
    client = OpenAI(base_url=f"http://localhost:{server}/v1", api_key="none", timeout=200, max_retries=0)

    def ask(**more: Any) -> Any:
        messages = [{"role": "user", "content": QUESTION}]
        return client.chat.completions.create(model=str(folder), messages=messages, max_tokens=8, temperature=0, **more)

    answer = ask()
    assert (answer.choices[0].message.content, answer.usage.completion_tokens) == (whole, 8)
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True) if chunk.choices]
    assert "".join(pieces) == whole and sum(map(bool, pieces)) > 2
    own = GenerationConfig(do_sample=False).to_json_string()  # as "transformers chat" sends its settings
    assert ask(extra_body={"generation_config": own}).choices[0].message.content == whole


def test_transformers_chat_talks_to_it(folder: Path, server: int) -> None:
    """Its client is huggingface_hub's, which offline mode forbids this machine's own address too."""
    words = ["chat", str(folder), f"http://localhost:{server}/v1", "max_new_tokens=8", "do_sample=False"]
    result = subprocess.run(
        [TRANSFORMERS, *words], input=f"{QUESTION}\nn\n!exit\n", text=True, capture_output=True, timeout=200,
        cwd=folder.parent, env=environment(folder.parent) | {"HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert expected(folder)[0] in result.stdout.replace("\n", ""), result.stdout
