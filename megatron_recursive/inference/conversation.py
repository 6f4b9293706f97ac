"""A conversation: turns of a user and a model, at a terminal or line by line through a pipe."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from megatron_recursive.data.files import replacing
from megatron_recursive.errors import UserError
from megatron_recursive.inference import output
from megatron_recursive.inference.generation import Settings, check_length, generate
from megatron_recursive.inference.loading import Loaded, set_blocks
from megatron_recursive.inference.text import Messages

_COMMANDS = "/reset, /temp X, /depth T, /save FILE, and /quit or Ctrl-D"
_PLAIN = " The tokenizer has no chat template: what you type is continued as plain text."
_COMMAND = re.compile(r"/([a-z]*)(?: +(.*))?")  # not a path, which has a second slash


class Conversation:
    """What was said so far, and how the next answer is made. Each answer reads the prompt anew, without a cache."""

    def __init__(self, loaded: Loaded, settings: Settings, args: argparse.Namespace) -> None:
        self.loaded, self.settings, self.args = loaded, settings, args
        self.opening: Messages = []
        if args.system is not None:
            if not loaded.text.has_chat_template:
                raise UserError("--system needs a chat template, which the tokenizer has not; leave it out.")
            self.opening = [{"role": "system", "content": args.system}]
        self.messages, self.left_out, self.saved = list(self.opening), 0, set[Path]()

    def hold(self) -> None:
        """Turns until the input ends. What cannot be is said, and the conversation goes on."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        output.say(f"Commands: {_COMMANDS}." + ("" if self.loaded.text.has_chat_template else _PLAIN))
        while (said := _read_line()) not in (None, "/quit"):
            try:
                if order := _COMMAND.fullmatch(said or ""):
                    output.say(self._obey(order[1], (order[2] or "").strip()))
                elif said:
                    self._answer(said)
            except UserError as error:
                output.say(str(error))

    def _obey(self, order: str, value: str) -> str:
        """What is to be said of it."""
        if order == "reset":
            self.messages, self.left_out = list(self.opening), 0
            return "The conversation starts over."
        if order == "temp" and re.fullmatch(r"\d*\.?\d+", value):
            self.settings = replace(self.settings, temperature=float(value))
            return f"Temperature {float(value):g}."
        if order == "depth" and re.fullmatch(r"\d+", value):
            set_blocks(self.loaded, int(value), "/depth")
            self.settings.check(self.loaded)
            return f"Depth {value}."
        if order == "save" and value:
            file = Path(re.sub(r"^(['\"])(.+)\1$", r"\2", value))
            if self.messages == self.opening:
                raise UserError("Nothing was said yet; save after an answer.")
            if file.exists() and file not in self.saved:
                raise UserError(f"{file} exists already; name another file.")
            with replacing(file) as (partial,):
                partial.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
            self.saved.add(file)
            return f"{file}: {len(self.messages)} messages."
        raise UserError(f"/{order} {value}".rstrip() + f" is no command; there are {_COMMANDS}.")

    def _answer(self, said: str) -> None:
        loaded, settings, args = self.loaded, self.settings, self.args
        messages: Messages = [*self.messages, {"role": "user", "content": said}]
        try:
            ids = self._window(messages)
            check_length(loaded, ids, "The turn")
        except UserError as error:
            raise UserError(f"{error} (The turn was dropped; /reset starts over.)") from error
        output.warn_of_cut(loaded, ids, settings, "the conversation")
        on_token = output.step_printer(loaded, len(messages) // 2, args) if args.show_recursive_steps else None
        streams = settings.num_beams == 1 and on_token is None
        try:
            (answer,) = generate(
                loaded, [ids], settings, output.write if streams else None, on_token, loaded.text.turn_end_ids
            )
        except KeyboardInterrupt:
            output.say("\nStopped; the turn was dropped.")
            return
        print("" if streams else answer.text, flush=True)
        output.say(f"[{output.summary(answer)}]")
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]

    def _window(self, messages: Messages) -> list[int]:
        """Token ids of the latest turns, as many as leave room for the answer; at least of the last one.

        The answer's room is --max-tokens, but at most half of the model's positions.
        """
        positions, first = self.loaded.max_positions, len(self.opening)
        most = None if positions is None else positions - min(self.settings.max_tokens, positions // 2)
        starts = [at for at, each in enumerate(messages) if at >= first and each["role"] == "user"]
        ids, left_out = self._encode(messages), 0
        while most is not None and len(ids) > most and left_out + 1 < len(starts):
            left_out += 1
            ids = self._encode(self.opening + messages[starts[left_out] :])
        if left_out > self.left_out:
            output.say(f"note: of {len(starts)} turns the first {left_out} no longer fit beside an answer into the "
                       f"{positions} positions, and are left out")  # fmt: skip
        self.left_out = left_out
        return ids

    def _encode(self, messages: Messages) -> list[int]:
        text = self.loaded.text
        if text.has_chat_template:
            return text.encode_chat(messages)
        parts = [("\n" if at and each["role"] == "user" else "") + each["content"] for at, each in enumerate(messages)]
        return text.encode_prompt("".join(parts))


def _read_line() -> str | None:
    """Without blanks around it; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
