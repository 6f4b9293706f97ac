"""The tokenizer of a chat dataset, with its own template or a default one; its whole folder is stored."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_recursive.command_line import command
from megatron_recursive.data.preparation import digest, vocabulary_digest
from megatron_recursive.data.tokenizer import (
    StoredTokenizer,
    TokenizerChoice,
    id_range,
    is_hub_name,
    load_tokenizer,
    name_class,
    open_tokenizer,
    tokenizer_files,
)
from megatron_recursive.errors import UserError

FOLDER = "tokenizer"
TOKENS = ("<|user|>", "<|enduser|>", "<|assistant|>", "<|endassistant|>", "<|system|>", "<|endsystem|>", "<|sep|>")
DEFAULT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|endassistant|>{% endgeneration %}"
    "{% elif message['role'] in ('user', 'system') %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end{{ message['role'] }}|>"
    "{% else %}{{ raise_exception('only system, user and assistant turns are known') }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}<|sep|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""For a tokenizer without a template: each turn between its two tokens, and ``<|sep|>`` between turns."""


def store_chat_tokenizer(choice: TokenizerChoice, folder: Path, target: str = "PREFIX_tokenizer") -> StoredTokenizer:
    """Write the folder of the tokenizer that the user names into ``folder``; one without a template gets the default.

    ``target`` is where the folder will lie in the end.

    Raises:
        UserError: there is no such tokenizer, or none that transformers loads as a fast one from a folder.
    """
    from megatron_recursive.data.chat.supervision import Template  # imports transformers

    tokenizer, rust = open_tokenizer(choice.check())
    rust.no_truncation()
    rust.no_padding()
    if tokenizer.chat_template is None:
        _add_default(tokenizer, choice, target)
    given = Path(choice.path or "")
    for file in tokenizer_files(given) if choice.path and given.is_dir() else []:
        place = folder / FOLDER / file.relative_to(given)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    tokenizer.save_pretrained(folder / FOLDER)
    name_class(folder / FOLDER)
    stored = load_tokenizer(folder / FOLDER)
    if stored.backend_tokenizer.to_str() != rust.to_str():
        raise UserError(f"{choice} loads otherwise than its files say; save it with save_pretrained and name that")
    if (template := Template(stored)).generation and not template.end_ids:
        print("WARNING: the chat template leaves the token that ends a turn out of {% generation %}, so that no model "
              "learns to end one; put it in front of {% endgeneration %}", file=sys.stderr)  # fmt: skip
    known, vocabulary = id_range(stored), stored.get_vocab()
    name = str(given.absolute()) if choice.path and given.exists() else str(choice)
    identity = digest([rust.to_str(), template.text, stored.special_tokens_map])[:16]
    file = folder / FOLDER / "tokenizer.json"
    return StoredTokenizer(file, stored.eos_token_id, known, identity, vocabulary_digest(vocabulary, known), name)


def _add_default(tokenizer: Any, choice: TokenizerChoice, target: str) -> None:
    from tokenizers import AddedToken

    before = id_range(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS], special_tokens=True)
    begins = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = "{{ bos_token }}" * begins + DEFAULT
    added = id_range(tokenizer) - before
    if added:
        named = choice.path is not None and (is_hub_name(choice.path) or any(Path(choice.path).glob("*.safetensors")))
        model = str(choice) if named else "MODEL"
        grow = command("convert", "import", "--hf", model, "--out", "CKPT", "--resize-vocab", target)
        print(f"the tokenizer has no chat template: it gets the default one, and {added} tokens from id {before} on; "
              f"a model without rows for them is grown by\n  {grow}", file=sys.stderr)  # fmt: skip
