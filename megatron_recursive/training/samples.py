"""``--generate-interval`` prints what the model would say, while it trains.

Samples are greedy full forwards in evaluation mode, without dropout and gradient, so that no random state and no number
of the training moves.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from megatron_recursive.data.chat.supervision import Template
from megatron_recursive.errors import UserError
from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel
from megatron_recursive.training import console, stagewise
from megatron_recursive.training.chat_data import is_chat


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("samples during training")
    group.add_argument(
        "--generate-interval", type=int, default=0, metavar="N",
        help="Every N iterations, print what the model would say after each --generation-prompt (default: 0, never).",
    )
    group.add_argument(
        "--generation-prompt", action="append", metavar="TEXT",
        help="A prompt for --generate-interval; may be given several times. Empty: from the end-of-document token.",
    )
    group.add_argument(
        "--generation-tokens", type=int, default=32, metavar="TOKENS", help="Length of a sample (default: 32)."
    )


def refuse_samples(args: argparse.Namespace) -> None:
    """Flags of this module that cannot be; needs no tokenizer."""
    if args.generate_interval < 0:
        raise UserError(f"--generate-interval must be 0 (never) or positive, but is {args.generate_interval}.")
    if args.generation_tokens < 1:
        raise UserError(f"--generation-tokens must be at least 1, but is {args.generation_tokens}.")
    if bool(args.generate_interval) != bool(args.generation_prompt):
        flags = ("--generate-interval", "--generation-prompt")
        given, other = flags if args.generate_interval else flags[::-1]
        raise UserError(f"{given} needs {other}; give both.")


def encode_prompts(args: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt; with conversations, of a user who says it.

    Raises:
        UserError: the tokenizer cannot read a prompt, or it fills the sequence.
    """
    encoded = []
    for prompt in args.generation_prompt or ():
        try:
            if is_chat(args) and prompt:
                turns = [{"role": "user", "content": prompt}]
                template = tokenizer._tokenizer.tokenizer.apply_chat_template
                ids = list(template(turns, add_generation_prompt=True, return_dict=False))
            else:
                ids = list(tokenizer.tokenize(prompt)) if prompt else [tokenizer.eod]
                if prompt and args.tokenizer_type == "HuggingFaceTokenizer":  # which may end every text
                    ids = ids[:-1] if ids[-1:] == [tokenizer.eod] == list(tokenizer.tokenize(""))[-1:] else ids
        except Exception as error:  # of whichever tokenizer it is
            reason = " ".join(str(error).split())[:100]
            raise UserError(
                f"--generation-prompt {prompt[:40]!r} cannot be read by the tokenizer ({reason}); give another one."
            ) from error
        if not ids or len(ids) >= args.seq_length or not all(0 <= each < args.padded_vocab_size for each in ids):
            raise UserError(
                f"--generation-prompt {prompt[:40]!r} has {len(ids)} tokens; it must have at least one of the model's "
                f"vocabulary, and fewer than --seq-length {args.seq_length}."
            )
        encoded.append(ids)
    return encoded


def print_samples(
    run: argparse.Namespace, chunks: list[Any], optimizer: Any, iteration: int, prompts: list[list[int]]
) -> None:
    """What the model says after each prompt of :func:`encode_prompts`. Every rank calls it."""
    from megatron.training import get_timers, get_tokenizer

    get_timers()("interval-time").stop()  # as around an evaluation: not a part of the time per iteration
    ends = _end_ids(run, get_tokenizer())
    with stagewise.evaluating(run, chunks, optimizer) as model:
        for prompt, ids in zip(run.generation_prompt, prompts, strict=True):
            if model is None:
                break
            room = min(len(ids) + run.generation_tokens, run.seq_length)
            tokens = greedy(model, ids, room, run.vocab_size, ends)
            text = get_tokenizer().detokenize(tokens[len(ids) :])
            if run.rank == 0:
                console.say(f"sample at iteration {iteration}: {prompt!r} -> {text!r}")
    get_timers()("interval-time", log_level=0).start(barrier=True)


def _end_ids(run: argparse.Namespace, tokenizer: Any) -> list[int]:
    """What ends a sample; of conversations the end of a turn too."""
    has_template = is_chat(run) and any(run.generation_prompt)
    return [tokenizer.eod, *(Template(tokenizer._tokenizer.tokenizer).end_ids if has_template else [])]


def greedy(model: RecursiveGPTModel, ids: list[int], length: int, vocab_size: int, ends: list[int]) -> list[int]:
    """``ids`` and the most likely continuation, up to ``length`` tokens or one of the tokens ``ends``.

    Collective over the tensor- and pipeline-parallel ranks of the model, which must all give the same arguments.
    """
    tokens = list(ids)
    while len(tokens) < length:
        token = _next_token(model, tokens, vocab_size)
        tokens.append(token)
        if token in ends:
            break
    return tokens


def _next_token(model: RecursiveGPTModel, tokens: list[int], vocab_size: int) -> int:
    """A forward over all tokens. Under sequence parallelism they are filled up, which causal attention does not see."""
    device = next(model.parameters()).device
    multiple = model.pg_collection.tp.size() if model.config.sequence_parallel else 1
    filled = tokens + [0] * (-len(tokens) % multiple)
    input_ids = torch.tensor([filled], device=device)
    positions = torch.arange(len(filled), device=device)[None]
    output_SBH = stagewise.run_passes(model, input_ids, positions)
    choice = torch.zeros(1, dtype=torch.long, device=device)
    if model.post_process:
        logits_BSV = model.logits_BSV(output_SBH, runtime_gather_output=True)
        choice = logits_BSV[:, len(tokens) - 1, :vocab_size].argmax(-1)
    return int(stagewise.from_stage(model, choice, model.pg_collection.pp.size() - 1))
