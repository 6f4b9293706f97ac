"""Supervised is what the assistant says and its end token, whatever the template makes of the turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from megatron_recursive.data.chat.formats import NotAConversation
from megatron_recursive.data.chat.options import ChatOptions
from megatron_recursive.data.chat.samples import fitted, supervised, windows
from megatron_recursive.data.chat.supervision import Template, load_chat_encoder
from megatron_recursive.data.chat.templates import DEFAULT, TOKENS
from megatron_recursive.data.tokenizer_training import train_tokenizer
from megatron_recursive.data.work_folder import PartReport
from tests.unit_tests.data import chat_templates
from tests.unit_tests.data.chat_templates import ADDED

TEXT = "Hello there, so long. Let me think of it: the sky is blue\n\n  and naïve 🙂 [/INST] words\n" * 40
SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [
    {"role": "user", "content": "Hi there 🙂"}, {"role": "assistant", "content": "🙂 Hello.\n\nWhat is it?"},
    {"role": "user", "content": "The sky?"}, {"role": "assistant", "content": "It is blue"},
]  # fmt: skip
THOUGHT = [dict(turn) for turn in TALK]
THOUGHT[1]["content"] = "<think>\nGreet.\n</think>\n\nHello."
THOUGHT[3]["content"] = "<think>\nOf Rayleigh.\n</think>\n\nBlue."
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    train_tokenizer([folder / "text.txt"], folder / "tok", 330)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in (*ADDED, *TOKENS)])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


@pytest.fixture(scope="module")
def encoder_of(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def encoder(name: str) -> tuple[Template, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tokenizer.chat_template = DEFAULT if name == "DEFAULT" else getattr(chat_templates, name)
            tokenizer.save_pretrained(folder)
            made[name] = load_chat_encoder(Path(folder))
        return made[name]

    return encoder


def said(encoder: tuple[Template, Any], messages: list[dict[str, str]], train_on: str = "assistant") -> list[str]:
    """The supervised runs, decoded from the tokens themselves."""
    template, rust = encoder
    text, spans = template.render(messages)
    encoding = rust.encode(text, add_special_tokens=False)
    assert rust.decode(encoding.ids, skip_special_tokens=False) == text
    spans = {"last": spans[-1:], "all": []}.get(train_on, spans)
    mask = supervised(encoding, text, spans, train_on == "all", template.added)
    runs: list[list[int]] = []
    for position, (token, counted) in enumerate(zip(encoding.ids, mask, strict=True)):
        if counted and (not position or not mask[position - 1]):
            runs.append([])
        if counted:
            runs[-1].append(token)
    return [rust.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("SMOLLM2", TALK, ["🙂 Hello.\n\nWhat is it?<|im_end|>", "It is blue<|im_end|>"]),
        ("LLAMA3", [SYSTEM, *TALK], ["🙂 Hello.\n\nWhat is it?<|eot_id|>", "It is blue<|eot_id|>"]),
        ("GEMMA2", [SYSTEM, *TALK], ["🙂 Hello.\n\nWhat is it?<end_of_turn>", "It is blue<end_of_turn>"]),
        ("MISTRAL", [SYSTEM, *TALK], ["🙂 Hello.\n\nWhat is it?</s>", "It is blue</s>"]),
        ("QWEN3", [SYSTEM, *THOUGHT], ["Hello.<|im_end|>", "<think>\nOf Rayleigh.\n</think>\n\nBlue.<|im_end|>"]),
        ("QWEN3", TALK, ["🙂 Hello.\n\nWhat is it?<|im_end|>", EMPTY + "It is blue<|im_end|>"]),
        # The prompt opens the thinking itself: an earlier turn has none, the last one goes on with it.
        ("QWEN3_THINKING", THOUGHT, ["Hello.<|im_end|>", "Of Rayleigh.\n</think>\n\nBlue.<|im_end|>"]),
        ("GENERATION", TALK, ["🙂 Hello.\n\nWhat is it?<|im_end|>", "It is blue<|im_end|>"]),
        ("DEFAULT", [SYSTEM, *TALK], ["🙂 Hello.\n\nWhat is it?<|endassistant|>", "It is blue<|endassistant|>"]),
    ],
)
def test_supervised_are_the_words_and_the_end_token(
    name: str, messages: list[dict[str, str]], expected: list[str], encoder_of: Any, tokenizer: Any
) -> None:
    encoder = encoder_of(name)
    assert said(encoder, messages) == expected
    assert encoder[0].end_ids == encoder[1].encode(expected[0]).ids[-1:]
    assert said(encoder, messages, "last") == expected[-1:]
    (whole,) = said(encoder, messages, "all")
    text, _ = encoder[0].render(messages)
    assert whole == text and ("Be kind." in text) == (SYSTEM in messages), "system turns are kept"
    if encoder[0].has_system:
        tokenizer.chat_template = encoder[0].text
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text


def test_where_the_template_writes_more_behind_the_words_nothing_is_guessed(encoder_of: Any) -> None:
    call = {**TALK[1], "tool_calls": [{"name": "f", "arguments": {}}]}
    for name, messages, why in (
        ("QWEN3", [TALK[0], call], "turn 2 that the chat template ends with no token of its own"),
        ("SMOLLM2", [TALK[0], {"role": "assistant", "content": "\n\nSo"}], "belongs to the prompt and to the answer"),
        ("GEMMA2", [*TALK[:1], TALK[0]], r"refused by the chat template \(Conversation roles must alternate"),
        ("DIVIDES", TALK, r"refused by the chat template \(division by zero\)"),
    ):
        with pytest.raises(NotAConversation, match=why):
            said(encoder_of(name), messages)


words = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(said_by_turns=st.lists(words, min_size=2, max_size=6), name=st.sampled_from(("SMOLLM2", "LLAMA3", "GEMMA2")))
def test_any_words_are_found_or_refused(said_by_turns: list[str], name: str, encoder_of: Any) -> None:
    roles = ("user", "assistant") * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, said_by_turns, strict=False)]
    end = {"SMOLLM2": "<|im_end|>", "LLAMA3": "<|eot_id|>", "GEMMA2": "<end_of_turn>"}[name]
    kept = [text if name == "SMOLLM2" else text.strip() for text in said_by_turns[1::2]]
    try:
        found = said(encoder_of(name), messages)
    except NotAConversation as error:
        assert "a token that belongs" in str(error) and any(text[:1].isspace() for text in kept)
    else:
        assert found == [text + end for text in kept]


@settings(max_examples=60, deadline=None)
@given(mask=st.binary(min_size=3, max_size=60), limit=st.integers(2, 20))
def test_a_split_sample_loses_no_supervised_token(mask: bytes, limit: int) -> None:
    mask = b"\0" + bytes(byte & 1 for byte in mask[1:])
    ids, report = [*range(len(mask))], PartReport()
    pieces = [*fitted(ids, mask, ChatOptions(seq_length=limit, overflow="split"), report)]
    assert all(len(tokens) == len(counted) <= limit for tokens, counted in pieces)
    predicted = [token for tokens, counted in pieces for token, one in [*zip(tokens, counted, strict=True)][1:] if one]
    assert predicted == [token for token in ids if mask[token]]
    (last,) = fitted(ids, mask, ChatOptions(seq_length=len(ids) - 1, overflow="truncate-left"), report)
    assert last == (ids[1:], mask[1:])
    assert report.dropped.get("samples split at --seq-length", 0) == (len(pieces) > 1)


def test_windows_of_turns_begin_with_the_user_and_keep_the_system_turn() -> None:
    report = PartReport()
    several = [*windows([SYSTEM, *TALK, *TALK, TALK[0]], 4, report)]
    assert several == [[SYSTEM, *TALK], [SYSTEM, *TALK]]
    assert [*windows(TALK, 2, report)] == [TALK[:2], TALK[2:]] and [*windows(TALK, 4, report)] == [TALK]
    assert sum(report.dropped.values()) == 3
