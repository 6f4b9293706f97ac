"""What is said at the start: whether passes are copies of what they read, and tokens that nothing tells apart."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_recursive.losses.telemetry import token_cosine, turn
from megatron_recursive.plan import DecoderPass
from megatron_recursive.training import console, stagewise
from megatron_recursive.training.chat_data import is_chat

TOKENS = 256  # at most; drawn uniformly from the vocabulary, so that they differ
NEAR_IDENTITY = 0.1  # a pass that turns what it reads by less is a copy of it
NEAR_EACH_OTHER = 0.5  # mean cosine between the output states of different tokens
SHOWN = 8


def tell_start(run: argparse.Namespace, chunks: list[Any], optimizer: Any) -> None:
    """Measure one forward of the model as it stands, and print how far each pass turns the sum that it reads.

    Every rank calls it; rank 0 prints, and warns where the passes are copies of what they read or the tokens of each
    other. Not of weights that were trained: their scales are no choice any more. Of frozen embeddings each
    tensor-parallel rank looks at its own rows.
    """
    with stagewise.evaluating(run, chunks, optimizer) as model:
        if model is not None and model.pre_process and run.lora_rank is not None and is_chat(run):
            tokens = IndexedDataset(run.chat_data)
            first = [torch.from_numpy(tokens.get(sample).astype("int64")) for sample in range(min(100, len(tokens)))]
            tell_equal_rows(model.embedding.word_embeddings, torch.cat(first).unique())
        if model is None or model.plan.is_plain:
            return
        turns, cosine, tokens = _measure(model, run)
    if run.rank != 0:
        return
    some = turns if len(turns) <= SHOWN else [*turns[: SHOWN - 2], None, turns[-1]]
    shown = " ".join("..." if value is None else f"{value:.2f}" for value in some)
    when = f"after iteration {run.iteration}" if run.iteration else "at the start"
    console.say(
        f"{when} passes turn what they read by {shown} (0: copies, 1.41: a right angle);\n"
        f"  token cosine after the last {cosine:.2f}, on {tokens} random tokens"
    )
    if run.iteration or run.finetune or run.init_from_gpt is not None:
        return
    if max(turns) < NEAR_IDENTITY:
        console.say(
            f"WARNING: all passes are near the identity, so that {len(turns)} of them say little more than one; raise "
            f"--init-method-std ({run.init_method_std:.3g} here, 1/sqrt(--hidden-size) is {run.hidden_size**-0.5:.3g})."
        )
    if cosine > NEAR_EACH_OTHER:
        console.say(
            "WARNING: the tokens are near each other after the last pass; raise --embedding-multiplier "
            f"({run.embedding_multiplier:.3g} here), so that the input stands beside the states."
        )


def tell_equal_rows(table: Any, ids_N: torch.Tensor) -> None:
    """Warn of tokens of conversations with one and the same frozen row, as an import grows them."""
    mine_N = ids_N[(ids_N >= table.vocab_start_index) & (ids_N < table.vocab_end_index)]
    rows_NH = table.weight.detach()[mine_N - table.vocab_start_index].float().cpu()
    _, group_N, counts = rows_NH.unique(dim=0, return_inverse=True, return_counts=True)
    same = mine_N[counts[group_N] > 1].tolist()
    if same:
        console.say(
            f"WARNING: the tokens {', '.join(map(str, same[:SHOWN]))} have the same embedding, which --lora-rank "
            "freezes, so that the model neither tells them apart nor ends a turn by one of them; train all weights on "
            "conversations first, or prepare them with a chat template whose tokens the model knows."
        )


def _measure(model: Any, run: argparse.Namespace) -> tuple[list[float], float, int]:
    """How far each pass turns what it reads, the token cosine after the last, and on how many tokens."""
    device = next(model.parameters()).device
    length = min(run.seq_length, TOKENS)
    length -= length % run.tensor_model_parallel_size
    generator = torch.Generator("cpu").manual_seed(run.seed)
    ids = torch.randint(run.vocab_size, (1, length), generator=generator).to(device)
    group = model.pg_collection.tp if model.config.sequence_parallel else None
    turns: list[torch.Tensor] = []

    def watch(_: DecoderPass, read_SBH: torch.Tensor, result_SBH: torch.Tensor) -> None:
        turns.append(turn(read_SBH, result_SBH, torch.ones_like(result_SBH[..., 0]), group))

    output_SBH = stagewise.run_passes(model, ids, torch.arange(length, device=device)[None], watch)
    cosine = token_cosine(output_SBH, torch.ones_like(output_SBH[..., 0], dtype=torch.float), group)
    return [float(total / count) for total, count in turns], float(cosine[0] / cosine[1]), length
