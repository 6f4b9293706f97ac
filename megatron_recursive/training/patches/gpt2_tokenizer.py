"""Patch of megatron-core 0.19: GPT-2's tokenizer from ``--vocab-file`` and ``--merge-file``.

Megatron 0.19.2's ``GPT2BPETokenizer`` asks the Hugging Face hub for the model ``gpt2`` even when both files are given,
so that it needs a network. Here Megatron's own wrapper is built from the two files alone.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import Any

from megatron.core.tokenizers import MegatronTokenizer
from megatron.training import global_vars

from megatron_recursive.data.tokenizer import gpt2_tokenizer


def is_asked_for(args: argparse.Namespace) -> bool:
    """Whether the flags name GPT-2's tokenizer and both of its files."""
    return args.tokenizer_type == "GPT2BPETokenizer" and bool(args.vocab_file) and bool(args.merge_file)


def install(args: argparse.Namespace) -> None:
    """Make it the tokenizer that ``megatron.training.get_tokenizer`` returns; see :func:`build`."""
    global_vars._GLOBAL_TOKENIZER = build(args)


def build(args: argparse.Namespace) -> Any:
    """Megatron's tokenizer over the two files; ``eod`` is ``<|endoftext|>``.

    Raises:
        UserError: the files are not a GPT-2 vocabulary and its merges.
    """
    with tempfile.TemporaryDirectory() as folder:
        gpt2_tokenizer(args.vocab_file, args.merge_file).save_pretrained(folder)
        tokenizer = MegatronTokenizer.from_pretrained(
            tokenizer_path=folder,
            metadata_path={"library": "huggingface"},
            additional_special_tokens=args.special_tokens or [],
            include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        )
    # The path is part of the name under which index files of the data are kept: it must be the same on all ranks and in
    # a resumed run, wherever the files lie.
    digest = hashlib.sha256(Path(args.vocab_file).read_bytes() + Path(args.merge_file).read_bytes())
    tokenizer.path = f"gpt2:{digest.hexdigest()[:16]}"
    return tokenizer
