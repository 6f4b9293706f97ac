"""Where in a rendered conversation the assistant speaks, found exactly or not at all.

A template with ``{% generation %}`` says it itself. Another one is asked: the whole conversation is rendered once as it
is, and once with a mark behind the words of each turn; without its marks it must be the same text. A turn of the
assistant begins where the turn before it is followed by what the template adds to prompt for an answer, and ends with
the added token that stands behind plain words. Both are read in the rendering of the whole: what a template makes of an
earlier turn (it may drop its thinking) is what counts.
"""

from __future__ import annotations

import functools
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_recursive.data.chat.formats import Message, NotAConversation
from megatron_recursive.data.readers import behind_space
from megatron_recursive.data.tokenizer import load_tokenizer
from megatron_recursive.errors import UserError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "Pq7"


class Template:
    """A tokenizer's chat template; :meth:`render` gives a text and where the assistant speaks in it.

    ``end_ids``: the added tokens that end an answer; none where the template puts none, or has it not supervised.

    Raises:
        UserError: the tokenizer has no template that is its default.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            self.text = tokenizer.get_chat_template()
        except ValueError as error:
            names = ", ".join(sorted(tokenizer.chat_template or {}))
            raise UserError(f"the tokenizer has no default chat template (only: {names}); call one default") from error
        self.generation = _GENERATION.search(self.text) is not None
        self._render = functools.partial(render_jinja_template, chat_template=self.text, **tokenizer.special_tokens_map)
        added = tokenizer.added_tokens_decoder
        self.added = _any_of([*added.values()])
        self.special = _any_of([token for token in added.values() if token.special])
        self.end_tokens: set[str] = set()
        self.has_system = self._shows_system()
        with suppress(NotAConversation):  # else every conversation is refused, with a sentence
            text, spans = self.render([{"role": role, "content": _PROBE} for role in ("user", "assistant") * 2])
            self.end_tokens = {text[start:end].rpartition(_PROBE)[2].strip() for start, end in spans}
        self.end_ids = [number for number, token in added.items() if str(token) in self.end_tokens]

    def render(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The text, and the characters of each turn of the assistant's: its words and its end token.

        Where the template knows no system turn, its text stands before the first user's, with an empty line between.

        Raises:
            NotAConversation: the template refuses the conversation, or a turn is not found in the text.
        """
        if not self.has_system and messages[0]["role"] == "system":
            system, first, *others = messages
            messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
        if self.generation:
            texts, spans = self._call([messages], return_assistant_tokens_mask=True)
            return texts[0], spans[0]
        return self._by_prefixes(messages)

    def _call(self, conversations: list[list[Message]], **options: Any) -> Any:
        try:
            return self._render(conversations, **options)
        except Exception as error:  # a template is a program: whatever it raises is its refusal
            reason = " ".join(str(error).split())[:150].rstrip(".")
            raise NotAConversation(f"is refused by the chat template ({reason})") from error

    def _shows_system(self) -> bool:
        turns = [{"role": role, "content": _PROBE + role} for role in ("system", "user", "assistant")]
        try:
            return f"{_PROBE}system" in self._call([turns])[0][0]
        except NotAConversation:
            return False

    def _by_prefixes(self, messages: list[Message]) -> tuple[str, list[Span]]:
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if not any(chr(code) in m["content"] for m in messages))
        marked = [_marked(message, mark, number) for number, message in enumerate(messages)]
        text, whole = self._call([messages, marked])[0]
        pieces, ends = _cut(whole, mark)
        if pieces != text:
            raise NotAConversation("is written otherwise by the chat template when its turns are followed by a mark")
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        # To render all that stands before each turn would take the square of the turns: where the first and the last
        # turn are prompted for alike, so are those between, if the text has it so.
        prompts = {number: self._prompt(marked, mark, number) for number in {answers[0], answers[-1]}}
        shared = prompts[answers[0]] if len({*prompts.values()}) == 1 else None
        spans = []
        for number in answers:
            before, words_end = ends.get(number - 1), ends.get(number)
            if before is None or words_end is None:
                raise NotAConversation(f"has a turn {number + 1} that the chat template does not write once")
            prompt = prompts.get(number, shared)
            if prompt is None or not text.startswith(prompt, before):
                prompt = prompts.get(number) or self._prompt(marked, mark, number)
            if not text.startswith(prompt, before):
                prompt = self._opening(marked, mark, number)
            start = before + len(prompt)
            end = self.added.match(text, behind_space(text, words_end))
            if start > words_end or not text.startswith(prompt, before):
                raise NotAConversation(f"has a turn {number + 1} that does not follow the chat template's own prompt")
            if end is None or (self.end_tokens and end.group() not in self.end_tokens):
                raise NotAConversation(f"has a turn {number + 1} that the chat template ends with no token of its own")
            spans.append((start, end.end()))
        return text, spans

    def _prompt(self, marked: list[Message], mark: str, number: int) -> str:
        """What stands between the words before this turn and its own, when the template prompts for it."""
        return self._call([marked[:number]], add_generation_prompt=True)[0][0].rpartition(mark)[2]

    def _opening(self, marked: list[Message], mark: str, number: int) -> str:
        """The same in the whole conversation: an earlier turn may lack what a prompt opens its thinking with."""
        bare = _marked({"role": "assistant", "content": ""}, mark, number)
        whole = self._call([[*marked[:number], bare, *marked[number + 1 :]]])[0][0]
        return whole.partition(f"{mark}{number - 1}{mark}")[2].partition(f"{mark}{number}{mark}")[0]


def _any_of(tokens: list[Any]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(map(str, tokens), key=len, reverse=True))) or r"(?!)")


def _marked(message: Message, mark: str, number: int) -> Message:
    """With a mark behind the words, and before the white space behind them, which templates may take away."""
    text = message["content"]
    words = text.rstrip()
    return {**message, "content": f"{words}{mark}{number}{mark}{text[len(words):]}"}


def _cut(marked: str, mark: str) -> tuple[str, dict[int, int]]:
    """The text without its marks, and where each was; none for one that is there twice."""
    pieces = marked.split(mark)
    ends: dict[int, int] = {}
    length = 0
    for number, piece in zip(pieces[1::2], pieces[::2], strict=False):
        length += len(piece)
        if int(number) in ends:
            ends[int(number)] = -1
        else:
            ends[int(number)] = length
    return "".join(pieces[::2]), {number: end for number, end in ends.items() if end >= 0}


@functools.lru_cache(maxsize=1)
def load_chat_encoder(folder: Path) -> tuple[Template, Any]:
    """As :func:`chat_encoder`, of a stored tokenizer's folder."""
    return chat_encoder(load_tokenizer(folder))


def chat_encoder(tokenizer: Any) -> tuple[Template, Any]:
    """The template of a tokenizer, and the tokenizer in Rust, which from now on adds nothing around a text."""
    rust = tokenizer.backend_tokenizer
    rust.post_processor = TemplateProcessing(single="$A", special_tokens=[])  # others move the offsets of white space
    return Template(tokenizer), rust
