"""Token ids mean something only with their tokenizer: a run's own is compared with the data's and the checkpoint's."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.training.global_vars import get_tokenizer

from megatron_recursive.data.indexed import largest_sampled_id
from megatron_recursive.data.joining import TOKENIZER
from megatron_recursive.data.preparation import read_preparation, vocabulary_digest
from megatron_recursive.errors import UserError
from megatron_recursive.training.refusals import prefixes_of

GO_ON = "or go on with --allow-other-tokenizer"


def note_tokenizer(args: argparse.Namespace) -> None:
    """Put the identity of the tokenizer into the arguments, which every checkpoint carries: ``IDS:DIGEST`` or None."""
    vocabulary = known_vocabulary()
    args.tokenizer_identity = None
    if vocabulary is not None:
        inner = getattr(get_tokenizer(), "_tokenizer", None)  # without what --special-tokens adds behind it
        below = getattr(inner, "original_vocab_size", None) or get_tokenizer().vocab_size
        args.tokenizer_identity = f"{below}:{vocabulary_digest(vocabulary, below)}"


def check_data(args: argparse.Namespace) -> None:
    """Refuse data whose ids the model has no rows for, or that another tokenizer made."""
    if args.mock_data:
        return
    rows, vocabulary = args.padded_vocab_size, None if args.allow_other_tokenizer else known_vocabulary()
    digest_below = functools.lru_cache(lambda below: vocabulary_digest(vocabulary or {}, below))
    for flag, prefix in prefixes_of(args):
        made = read_preparation(prefix)
        named = made and (made.tokenizer if made.kind == "text" else
                          f"{prefix}_tokenizer, for whose added tokens convert import --resize-vocab grows a model")
        if made is None:
            largest = largest_sampled_id(prefix)
            if largest >= rows:
                raise UserError(
                    f"{flag} {prefix} holds the token id {largest}, but this run's tokenizer makes a vocabulary of "
                    f"{rows}; give the tokenizer that the data was prepared with, or prepare it again."
                )
        elif made.kind == "chat" and not flag.endswith("chat-data"):
            raise UserError(f"{flag} {prefix} holds conversations, of which it would count every token; give "
                            f"--chat-data {prefix}.")  # fmt: skip
        elif made.vocab_size > rows:
            raise UserError(
                f"{flag} {prefix} was prepared with a vocabulary of {made.vocab_size} (tokenizer {named}), "
                f"but this run's tokenizer makes one of {rows}; give that tokenizer, or prepare the data again."
            )
        elif vocabulary is not None and digest_below(made.vocab_size) != made.vocabulary:
            raise UserError(
                f"{flag} {prefix} was prepared with another tokenizer ({named}) than this run's, to which its "
                f"token ids mean something else; give that one, prepare the data again, {GO_ON}."
            )
        elif vocabulary is not None and made.kind == "chat" and _is_written_otherwise(prefix):
            raise UserError(f"{flag} {prefix} was written by another chat template than this run's tokenizer has; give "
                            f"--tokenizer-model {prefix}{TOKENIZER}, {GO_ON}.")  # fmt: skip


def _is_written_otherwise(prefix: str) -> bool:
    """Whether conversations were written by another template than that of a transformers tokenizer."""
    file = Path(f"{prefix}{TOKENIZER}/chat_template.jinja")
    own = getattr(getattr(getattr(get_tokenizer(), "_tokenizer", None), "tokenizer", None), "chat_template", None)
    return file.is_file() and not isinstance(own, dict) and file.read_text("utf-8") != own


def check_checkpoint(folder: Path, saved: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Refuse to go on with another tokenizer of the same size."""
    if not args.allow_other_tokenizer and was_another(saved):
        raise UserError(
            f"The checkpoint {folder} was trained with another tokenizer ({saved.get('tokenizer_model')}) of the same "
            f"size; give it with --tokenizer-model, {GO_ON}."
        )


def was_another(saved: Mapping[str, Any]) -> bool:
    """Whether the tokenizer that a checkpoint's arguments tell of is known not to be this run's."""
    identity, vocabulary = saved.get("tokenizer_identity"), known_vocabulary()
    below, _, digest = str(identity).partition(":")
    return identity is not None and vocabulary is not None and vocabulary_digest(vocabulary, int(below)) != digest


def known_vocabulary() -> dict[str, int] | None:
    """Token to id; None for a tokenizer that has no tokens (NullTokenizer) or does not list them."""
    inner: Any = getattr(getattr(get_tokenizer(), "_tokenizer", None), "tokenizer", None)
    if hasattr(inner, "get_vocab"):
        return dict(inner.get_vocab())
    if hasattr(inner, "id_to_piece"):  # SentencePiece
        return {inner.id_to_piece(number): number for number in range(inner.get_piece_size())}
    return None
