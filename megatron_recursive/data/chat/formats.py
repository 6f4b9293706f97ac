"""From a record of a file to conversations: lists of messages with a role and a content, as templates take them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_recursive.data.chat.options import ChatOptions
from megatron_recursive.data.readers import Record, Reject, read_records
from megatron_recursive.data.spans import Span
from megatron_recursive.errors import UserError

Message = dict[str, Any]

KEYS = ("conversations", "messages", "prompt", "instruction", "input", "output", "system", "history", "tools")
ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
# What templates read beside the content; and by which a turn is taken out of the loss.
_KEPT = ("reasoning_content", "tool_calls", "tool_call_id", "name", "weight", "train")
_FORMS = {"sharegpt": ("conversations",), "messages": ("messages",), "openassistant": ("prompt", "messages"),
          "alpaca": ("instruction",)}  # fmt: skip


class NotAConversation(ValueError):
    """What is wrong with a record: the sentence without its place."""


@dataclass(frozen=True)
class Conversation:
    """The messages that ``record`` holds, or one of the conversations in it."""

    messages: list[Message]
    record: Record

    def refusal(self, error: NotAConversation) -> UserError:
        return UserError(f"{self.record.place} {error}; mend or remove it")


def iter_conversations(span: Span, options: ChatOptions, reject: Reject) -> Iterator[Conversation]:
    """The conversations of a span's records; what is none goes to ``reject``, with file and line."""
    for record in read_records(span, KEYS, reject):
        try:
            several = [*conversations_of(record.value, options)]
        except NotAConversation as error:
            reject(Conversation([], record).refusal(error))
            continue
        for messages in several:
            yield Conversation(messages, record)


def conversations_of(record: dict[str, Any], options: ChatOptions) -> Iterator[list[Message]]:
    """What a record holds: one conversation, or the paths of a message tree.

    Raises:
        NotAConversation: it is of no known form, or of another than is asked, or a turn of it is malformed.
    """
    if record.get("tools"):
        raise NotAConversation("has tools, whose definitions are not written here")
    keys = [key for form in ([options.form] if options.form else _FORMS) for key in _FORMS[form]]
    found = next((key for key in keys if record.get(key) is not None), None)
    if found == "instruction":
        yield _checked(_alpaca(record))
    elif found == "prompt" and isinstance(record[found], dict):
        for path in _paths(record[found], every=options.paths == "all"):
            yield _checked([_message(turn, number) for number, turn in enumerate(path, 1)])
    elif found is not None and isinstance(record[found], list):
        messages = [_message(turn, number) for number, turn in enumerate(record[found], 1)]
        yield _checked(messages if messages and messages[0]["role"] == "system" else [*_system(record), *messages])
    elif "parent_id" in record:
        raise NotAConversation("is a single message of a tree; give the file of the trees, or of whole conversations")
    else:
        there = ", ".join(map(repr, list(record)[:8])) or "none"
        asked = f"no {options.form} conversation" if options.form else "no conversation of a known format"
        raise NotAConversation(f"is {asked} (its keys: {there})")


def _alpaca(record: dict[str, Any]) -> list[Message]:
    """Behind earlier exchanges the user says the instruction, an empty line, and the input if there is one."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise NotAConversation("has a history that is no list of pairs of texts")
    asked = "\n\n".join(filter(None, (_text(record, "instruction"), _text(record, "input"))))
    said = [*itertools.chain.from_iterable(history), asked, _text(record, "output")]
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]
    return [_message(turn, number) for number, turn in enumerate((*_system(record), *turns), 1)]


def _system(record: dict[str, Any]) -> list[Message]:
    """The turn of a system's text that stands beside the others."""
    text = _text(record, "system")
    return [_message({"role": "system", "content": text}, 0)] if text else []


def _text(record: dict[str, Any], key: str) -> str:
    text = record.get(key) or ""
    if not isinstance(text, str):
        raise NotAConversation(f"has a {type(text).__name__} under {key!r}, which must be a string")
    return text


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise NotAConversation(f"has a turn {number} that is no JSON object")
    role = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    text = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)
    if role is None:
        raise NotAConversation(f"has a turn {number} without a role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise NotAConversation(f"has a turn {number} of unknown role ({str(role)[:40]!r})")
    kept = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    if not isinstance(text, str):
        what = "null or missing" if text is None else f"a {type(text).__name__}"
        raise NotAConversation(f"has a turn {number} whose text is {what}")
    if not text.strip() and role != "system" and "tool_calls" not in kept:
        raise NotAConversation(f"has an empty turn {number}")
    if kept.get("weight", 1) not in (0, 1):
        raise NotAConversation(f"has a turn {number} of weight {kept['weight']}, where 0 and 1 are known")
    try:
        json.dumps([text, kept], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise NotAConversation(f"has a turn {number} that is not UTF-8, or half a surrogate pair") from error
    return {"role": ROLES[role.lower()], "content": text, **kept}


def _checked(messages: list[Message]) -> list[Message]:
    said = [message["role"] for message in messages if message["role"] != "system"]
    for before, role in itertools.pairwise([None, *said]):
        if role == before and role != "tool":
            raise NotAConversation(f"has two {role} turns in a row")
    if "assistant" not in said:
        raise NotAConversation("has no assistant turn")
    if said[0] != "user":
        raise NotAConversation(f"begins with the {said[0]}")
    return messages


def _paths(tree: dict[str, Any], every: bool) -> Iterator[Sequence[dict[str, Any]]]:
    """From a tree of messages, its paths up to the last assistant's message, the best-ranked first or alone."""
    open_paths, seen = [[tree]], set[int]()
    while open_paths:
        path = open_paths.pop()
        replies = path[-1].get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise NotAConversation("has replies that are no list of messages")
        replies = [reply for reply in replies if not reply.get("deleted")]
        # A message that nobody ranked comes last.
        replies.sort(key=lambda reply: reply["rank"] if isinstance(reply.get("rank"), int) else math.inf)
        open_paths += [[*path, reply] for reply in reversed(replies if every else replies[:1])]
        if not replies:
            while len(path) > 1 and path[-1].get("role") in ("prompter", "user"):
                path.pop()
            if id(path[-1]) not in seen:
                seen.add(id(path[-1]))
                yield path
