"""From text to token ids and back, whatever the tokenizer; and the chat template, where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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
        ...

    def encode(self, text: str) -> list[int]: ...

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

    def encode_chat(self, messages: Messages) -> list[int]:
        return list(self.tokenizer(self._render(messages, True), add_special_tokens=False)["input_ids"])

    def _render(self, messages: Messages, to_answer: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_answer)
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"The tokenizer's chat template refuses the conversation ({reason}).") from error
        return str(text)

    @property
    def turn_end_ids(self) -> list[int]:
        """The added token that the template puts behind an answer, where it puts one."""
        if not self.has_chat_template:
            return []
        text = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "WORDS"}], False)
        ids = self.tokenizer(text.rpartition("WORDS")[2], add_special_tokens=False)["input_ids"]
        return [each for each in ids[:1] if each in self.tokenizer.added_tokens_decoder]

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

    def encode_chat(self, messages: Messages) -> list[int]:
        raise AssertionError("there is no chat template")

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(f" {each}" for each in ids)
