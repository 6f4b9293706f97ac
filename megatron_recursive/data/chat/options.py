"""What is asked of a chat dataset."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_recursive.errors import UserError

FORMATS = ("sharegpt", "alpaca", "openassistant", "messages")
TRAIN_ON = ("assistant", "last", "all")
OVERFLOW = ("drop", "truncate-left", "split")
PATHS = ("best", "all")


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are read, cut and supervised; the flags of the command say what each word means.

    ``form`` None: each record is recognised by its keys. ``seq_length`` None: conversations are as long as they are.
    """

    form: str | None = None
    paths: str = "best"
    train_on: str = "assistant"
    seq_length: int | None = None
    overflow: str = "drop"
    max_turns: int | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--seq-length", self.seq_length), ("--max-turns", self.max_turns)):
            if value is not None and value < 2:
                raise UserError(f"{flag} {value} is too few; give 2 or more")
        if self.overflow != "drop" and self.seq_length is None:
            raise UserError(f"--overflow {self.overflow} says what becomes of longer samples; give --seq-length too")
