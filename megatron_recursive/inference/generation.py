"""Prompts to answers: what may be asked for, and transformers' ``generate`` behind it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from megatron_recursive.errors import UserError
from megatron_recursive.hf.model.exits_recursive_gpt import ExitOptions
from megatron_recursive.inference.loading import Loaded


@dataclass(frozen=True)
class Settings:
    """How to choose tokens, and when they may leave the recursion.

    Attributes:
        temperature: 0 takes the most likely token; None is 0, or 1 where top_k or top_p is given.
        exit, halt_threshold, exit_threshold, exit_stable_blocks, max_inference_refinement_steps: as
            ``hf/model/exits_recursive_gpt.py`` has them; None leaves them to the model.
    """

    max_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    seed: int = 0
    exit: str | None = None
    halt_threshold: float | None = None
    exit_threshold: float | None = None
    exit_stable_blocks: int | None = None
    max_inference_refinement_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("top_k", 1), ("num_beams", 1), ("temperature", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"{_flag(name)} must be at least {least}, but is {value}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must lie above 0 and at most at 1, but is {self.top_p}.")
        if not self.repetition_penalty > 0:
            raise UserError(f"--repetition-penalty must be above 0, but is {self.repetition_penalty}.")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise UserError(f"{_flag(name)} samples, but --temperature 0 does not; give either.")
        if self.exit is None:
            for name in _EXIT_KNOBS:
                if getattr(self, name) is not None:
                    raise UserError(f"{_flag(name)} belongs to an exit; give --exit too.")

    @property
    def samples(self) -> bool:
        if self.temperature is None:
            return self.top_k is not None or self.top_p is not None
        return self.temperature > 0

    @property
    def exit_arguments(self) -> dict[str, Any]:
        return {} if self.exit is None else {name: getattr(self, name) for name in ("exit", *_EXIT_KNOBS)}

    def check(self, loaded: Loaded) -> None:
        """Refuse an exit that this model does not have."""
        if self.exit is None:
            return
        if not loaded.recursive:
            raise UserError(f"--exit {self.exit} needs a recursive model, but {loaded.name} is a plain one.")
        try:
            ExitOptions.make(loaded.model.config, **self.exit_arguments)
        except ValueError as error:
            said = re.sub("|".join(_EXIT_KNOBS), lambda name: _flag(name[0]), str(error).rstrip("."))
            raise UserError(f"--exit {self.exit}: {said}.") from error


_EXIT_KNOBS = ("halt_threshold", "exit_threshold", "exit_stable_blocks", "max_inference_refinement_steps")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class BlockReading:
    """What one block would have said in place of a new token.

    Attributes:
        token, probability: its most likely token. said_probability: of the token that was generated in the end.
        halting_probability: None where the model has no halting head.
    """

    block: int
    token: int
    probability: float
    said_probability: float
    halting_probability: float | None


@dataclass
class Answer:
    """What came of a prompt; ``seconds`` and ``report``, an ``ExitReport`` under an exit, are of its whole batch."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    seconds: float
    report: Any = None
    batch_size: int = 1


def encode_prompt(loaded: Loaded, prompt: str, name: str = "The prompt") -> list[int]:
    """Token ids of a prompt; an empty one begins a text of its own.

    Raises:
        UserError: it is empty and the tokenizer knows no start, or it cannot be answered (:func:`check_length`).
    """
    ids = loaded.text.encode_prompt(prompt)
    if not ids:
        if loaded.text.start_id is None:
            raise UserError(f"{name} is empty, and the tokenizer has no token that begins a text; give some words.")
        ids = [loaded.text.start_id]
    check_length(loaded, ids, name)
    return ids


def check_length(loaded: Loaded, ids: list[int], name: str) -> None:
    """Refuse a prompt that leaves no room for an answer, or of a tokenizer that is not the model's."""
    known = loaded.model.config.vocab_size
    if max(ids) >= known:
        raise UserError(
            f"{name} holds the token id {max(ids)}, but {loaded.name} has a vocabulary of {known}; give the tokenizer "
            "that it was trained with, with --tokenizer."
        )
    if loaded.max_positions is not None and len(ids) >= loaded.max_positions:
        raise UserError(
            f"{name} has {len(ids)} tokens, which leaves no room for an answer in the {loaded.max_positions} positions "
            f"of {loaded.name}; shorten it."
        )


def room_for(loaded: Loaded, ids: list[int], settings: Settings) -> int:
    """The new tokens that a prompt may get."""
    room = settings.max_tokens
    return room if loaded.max_positions is None else min(room, loaded.max_positions - len(ids))


def generate(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    settings: Settings,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[int, list[BlockReading]], None] | None = None,
    stop_ids: Sequence[int] = (),
) -> list[Answer]:
    """Go on from prompts that have the same :func:`room_for`, as one batch that is padded on the left.

    The same seed gives the same answers to the same batch, whatever was generated before; without sampling, any batch.

    Args:
        on_text: called with each piece of the answer as soon as it is known; of one prompt, without beams.
        on_token: called with each new token and what every block would have said; of one prompt, without beams.
        stop_ids: tokens that end an answer besides the model's own.
    """
    room, width = room_for(loaded, prompts[0], settings), max(map(len, prompts))
    padded = [[prompts[0][0]] * (width - len(ids)) + ids for ids in prompts]
    input_ids = torch.tensor(padded, device=loaded.model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=input_ids.device)
    torch.manual_seed(settings.seed)
    ends = [*_end_ids(loaded), *stop_ids]
    listener = _Listener(loaded, prompts[0], ends, on_text, on_token) if on_text or on_token else None
    extra: dict[str, Any] = {"streamer": listener} if listener is not None else {}
    if on_token is not None:
        extra["output_blocks"] = True
    start = time.perf_counter()
    with _generation_config(loaded, settings, room, ends), _listening(loaded.model, listener, on_token is not None):
        output = loaded.model.generate(input_ids, attention_mask=mask, **settings.exit_arguments, **extra)
    seconds, answers = time.perf_counter() - start, []
    for ids, tokens in zip(prompts, output[:, width:].tolist(), strict=True):
        end = next((number for number, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if end is None else tokens[: end + 1]  # behind it lies padding
        reason, text = "length" if end is None else "stop", text_after(loaded, ids, tokens[:end])
        report = loaded.model.last_exit_report if settings.exit is not None else None
        answers.append(Answer(text, tokens, len(ids), reason, seconds, report, len(prompts)))
    return answers


def text_after(loaded: Loaded, ids: list[int], tokens: list[int]) -> str:
    """The text that the tokens add; decoded behind the prompt, since tokenizers drop a first blank."""
    return loaded.text.decode(ids + tokens)[len(loaded.text.decode(ids)) :]


def _end_ids(loaded: Loaded) -> list[int]:
    own = getattr(loaded.model.generation_config, "eos_token_id", None)
    if own is None:
        return loaded.text.end_ids
    return own if isinstance(own, list) else [own]


@contextmanager
def _generation_config(loaded: Loaded, settings: Settings, room: int, ends: list[int]) -> Iterator[None]:
    """Have the model generate by the settings alone, not by what its folder recommends."""
    before = loaded.model.generation_config
    pad = getattr(before, "pad_token_id", None)
    chosen = GenerationConfig(
        max_new_tokens=room, num_beams=settings.num_beams, do_sample=settings.samples,
        repetition_penalty=settings.repetition_penalty, eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else (ends[0] if ends else 0),
    )  # fmt: skip
    if settings.samples:
        chosen.temperature = 1.0 if settings.temperature is None else settings.temperature
        chosen.top_k, chosen.top_p = settings.top_k or 0, 1.0 if settings.top_p is None else settings.top_p
    loaded.model.generation_config = chosen
    try:
        yield
    finally:
        loaded.model.generation_config = before


class _Listener(BaseStreamer):
    """Hears every new token from ``generate``, and what the heads said at it from the model's own outputs."""

    def __init__(
        self, loaded: Loaded, ids: list[int], ends: list[int], on_text: Callable[[str], None] | None,
        on_token: Callable[[int, list[BlockReading]], None] | None,
    ) -> None:  # fmt: skip
        self.loaded, self.ids, self.ends, self.on_text, self.on_token = loaded, ids, ends, on_text, on_token
        self.tokens: list[int] = []
        self.said = 0
        self.heard_prompt = False
        self.reading: tuple[Tensor, Tensor | None] | None = None

    def hear_outputs(self, _: Any, __: Any, outputs: Any) -> None:
        """A forward hook: the probabilities after each block at the last position, [T, V], and of halting, [T]."""
        blocks = len(outputs.block_logits) if outputs.blocks is None else int(outputs.blocks[0, -1])
        halting = None if outputs.block_halting is None else outputs.block_halting[:blocks, 0, -1]
        self.reading = outputs.block_logits[:blocks, 0, -1].float().softmax(-1), halting

    def put(self, value: Tensor) -> None:
        if not self.heard_prompt:
            self.heard_prompt = True
            return
        token = int(value.flatten()[0])
        self.tokens.append(token)
        if self.on_token is not None:
            self.on_token(token, self._readings(token))
        if self.on_text is not None and token not in self.ends:
            self._say(final=False)

    def end(self) -> None:
        if self.on_text is not None:
            self._say(final=True)

    def _say(self, *, final: bool) -> None:
        said = self.tokens[:-1] if self.tokens and self.tokens[-1] in self.ends else self.tokens
        text = text_after(self.loaded, self.ids, said)
        if (final or not text.endswith("\ufffd")) and len(text) > self.said:  # half of a character is not shown
            assert self.on_text is not None
            self.on_text(text[self.said :])
            self.said = len(text)

    def _readings(self, token: int) -> list[BlockReading]:
        assert self.reading is not None
        probabilities, halting = self.reading
        return [
            BlockReading(block + 1, int(each.argmax()), float(each.max()), float(each[token]),
                         None if halting is None else float(halting[block]))
            for block, each in enumerate(probabilities)
        ]  # fmt: skip


@contextmanager
def _listening(model: Any, listener: _Listener | None, reads_blocks: bool) -> Iterator[None]:
    if listener is None or not reads_blocks:
        yield
        return
    hook = model.register_forward_hook(listener.hear_outputs)
    try:
        yield
    finally:
        hook.remove()
