"""From text to token ids and back, whatever the tokenizer; and the chat template, where it has one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_recursive.data.chat.supervision import Template
from megatron_recursive.errors import UserError

Messages = list[dict[str, str]]  # {"role": "user" or "assistant", "content": ...}


class Text(Protocol):
    """What generation needs of a tokenizer. ``start_id`` begins a text of its own; ``end_ids`` end one."""

    start_id: int | None
    end_ids: list[int]
    has_chat_template: bool

    @property
    def turn_end_ids(self) -> list[int]:
        """Tokens that end what the assistant says in a chat."""

    def encode(self, text: str) -> list[int]: ...

    def encode_prompt(self, text: str) -> list[int]:
        """Without the token with which some tokenizers end every text: an answer would stand behind the end."""

    def encode_chat(self, messages: Messages) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str: ...


class TokenizerText:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        end = tokenizer.eos_token_id
        self.end_ids = [] if end is None else [end]
        self.start_id = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def encode_prompt(self, text: str) -> list[int]:
        ids, own = self.encode(text), list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        added = not own or ids[-len(own) :] != own  # else an end is the prompt's own
        return ids[:-1] if added and ids[-1:] == self.end_ids else ids

    def encode_chat(self, messages: Messages) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"The tokenizer's chat template refuses the conversation ({reason}).") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @functools.cached_property
    def turn_end_ids(self) -> list[int]:
        return Template(self.tokenizer).end_ids if self.has_chat_template else []

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))


class NumberText:
    """Megatron's NullTokenizer: a text is a list of token ids, separated by blanks; the last id ends documents."""

    has_chat_template = False
    turn_end_ids: list[int] = []

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.start_id: int | None = vocab_size - 1
        self.end_ids = [vocab_size - 1]

    def encode(self, text: str) -> list[int]:
        ids = [int(word) if word.isascii() and word.isdigit() else -1 for word in text.split()]
        if any(not 0 <= each < self.vocab_size for each in ids):
            raise UserError(
                f"The prompt {text[:40]!r} must hold token ids from 0 to {self.vocab_size - 1}, separated by blanks, "
                "since the model was trained with NullTokenizer."
            )
        return ids

    encode_prompt = encode

    def encode_chat(self, messages: Messages) -> list[int]:
        raise AssertionError("there is no chat template")

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(f" {each}" for each in ids)
