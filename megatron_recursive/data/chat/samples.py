"""From conversations to samples: token ids, and for each token whether the loss counts it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_recursive.data.chat.formats import Conversation, Message, NotAConversation
from megatron_recursive.data.chat.options import ChatOptions
from megatron_recursive.data.chat.supervision import Span, Template
from megatron_recursive.data.readers import Reject
from megatron_recursive.data.work_folder import PartReport

Sample = tuple[list[int], bytes]


def samples_of(
    conversations: Sequence[Conversation], template: Template, rust: Any, options: ChatOptions, report: PartReport,
    reject: Reject,
) -> Iterator[Sample]:  # fmt: skip
    """The samples of conversations, in order; what is left out or cut is counted in ``report``."""
    rendered: list[tuple[Conversation, str, list[Span]]] = []
    whole = options.train_on == "all"
    for conversation in conversations:
        try:
            pieces = []
            for messages in windows(conversation.messages, options.max_turns, report):
                text, spans = template.render(messages)
                counts = [message.get("weight", 1) != 0 and message.get("train") is not False
                          for message in messages if message["role"] == "assistant"]  # fmt: skip
                counts[:-1] = [options.train_on != "last" and each for each in counts[:-1]]
                if len(spans) != len(counts) and not (spans and all(counts)):
                    raise NotAConversation(f"has {len(counts)} answers, where the chat template marks {len(spans)}")
                if not all(counts) or whole:  # of the whole text, those that are taken out
                    spans = [] if all(counts) else [s for s, each in zip(spans, counts, strict=True) if each != whole]
                pieces.append((conversation, text, spans))
            rendered += pieces
            if any(template.special.search(message["content"]) for message in conversation.messages):
                report.drop("conversations kept in whose words a special token is written out, which it then is")
        except NotAConversation as error:
            reject(conversation.refusal(error))
    encodings = rust.encode_batch([text for _, text, _ in rendered], add_special_tokens=False)
    for (conversation, text, spans), encoding in zip(rendered, encodings, strict=True):
        try:
            sample = encoding.ids, supervised(encoding, text, spans, whole, template.added)
        except NotAConversation as error:
            reject(conversation.refusal(error))
            continue
        for ids, counted in fitted(*sample, options, report):
            # Nothing stands before the first token of a sample from which it could be predicted.
            counted = b"\0" + counted[1:]
            if 1 in counted:
                yield ids, counted
            else:
                report.drop("samples left out, since nothing in them is supervised")


def supervised(encoding: Any, text: str, spans: Sequence[Span], whole: bool, added: re.Pattern[str]) -> bytes:
    """For each token 1 where the loss counts it: in the spans, or with ``whole`` outside of them.

    Raises:
        NotAConversation: a turn begins or ends within a token.
    """
    mask = bytearray(len(encoding.ids))
    for start, end in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None or encoding.token_to_chars(first)[0] != start:
            raise NotAConversation("has a token that belongs to the prompt and to the answer")
        while last + 1 < len(mask) and encoding.token_to_chars(last + 1)[0] < end:  # the bytes of one character
            last += 1
        begin, stop = encoding.token_to_chars(last)
        # Some end tokens take the white space behind them.
        if stop > end and (text[end:stop].strip() or not added.match(text, begin)):
            raise NotAConversation("has a token that belongs to the answer and to what follows")
        mask[first : last + 1] = b"\1" * (last + 1 - first)
    return bytes(1 - each for each in mask) if whole else bytes(mask)


def windows(messages: list[Message], max_turns: int | None, report: PartReport) -> Iterator[list[Message]]:
    """Pieces of whole exchanges with at most so many turns, each behind the system turn, which is not counted."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    if max_turns is None or len(turns) <= max_turns:
        yield messages
        return
    report.drop("conversations cut into pieces of --max-turns")
    starts = [number for number, message in enumerate(turns) if message["role"] == "user"]
    piece: list[Message] = []
    for start, end in zip(starts, [*starts[1:], len(turns)], strict=True):
        exchange = turns[start:end]
        if not any(message["role"] == "assistant" for message in exchange) or len(exchange) > max_turns:
            report.drop("exchanges left out, of more than --max-turns or without an answer")
            continue
        if piece and len(piece) + len(exchange) > max_turns:
            yield [*system, *piece]
            piece = []
        piece += exchange
    if piece:
        yield [*system, *piece]


def fitted(ids: list[int], mask: bytes, options: ChatOptions, report: PartReport) -> Iterator[Sample]:
    """Samples of at most ``--seq-length`` tokens."""
    limit = options.seq_length
    if limit is None or len(ids) <= limit:
        yield ids, mask
    elif options.overflow == "drop":
        report.drop("samples left out, longer than --seq-length")
    elif options.overflow == "truncate-left":
        report.drop("samples cut at the left to --seq-length")
        yield ids[-limit:], mask[-limit:]
    else:
        report.drop("samples split at --seq-length")
        # Each begins with the last token of the one before, from which its next one is predicted.
        for start in range(0, len(ids) - 1, limit - 1):
            yield ids[start : start + limit], mask[start : start + limit]
