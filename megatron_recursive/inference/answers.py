"""How a model does at a task's answers: accuracy by level and block, and where they leave under an exit."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from megatron_recursive.data.tasks import ANSWERS, FILLER, SYMBOLS, read_task
from megatron_recursive.errors import UserError
from megatron_recursive.inference.generation import Settings
from megatron_recursive.inference.loading import Loaded

_BATCH = 256  # documents read at a time


@torch.no_grad()
def evaluate(loaded: Loaded, data: str, settings: Settings) -> tuple[str, list[dict[str, Any]]]:
    """Read every document with its answers hidden, as in training.

    Args:
        settings: which exit; with one, documents are read once more, and every token of them leaves by it.

    Returns:
        What a level is (hops), and a record a level and one of all (level None): ``answers``, ``accuracy`` after each
        block, ``whole``, the share of documents with every answer right after the last one, and with an exit ``exit
        accuracy`` and ``exit block``, the mean of the blocks that the answers took.

    Raises:
        UserError: the data is no task, or does not fit the model.
    """
    name, ids = read_task(data)
    tokens_NS = torch.from_numpy(ids.astype("int64"))
    length, positions = tokens_NS.shape[1], loaded.max_positions
    if positions is not None and length > positions:
        raise UserError(f"--data {data} has documents of {length} tokens, but {loaded.name} takes {positions}.")
    if int(tokens_NS.max()) >= loaded.model.config.vocab_size:
        raise UserError(f"--data {data} holds token ids that {loaded.name} does not have; name a model trained on it.")
    found: dict[str, list[Tensor]] = {"level": [], "accuracy": [], "exit accuracy": [], "exit block": []}
    whole: dict[int | None, list[float]] = {None: []}
    for batch_BS in tokens_NS.to(loaded.model.device).split(_BATCH):
        inputs_BS, labels_BS = batch_BS.masked_fill(batch_BS >= ANSWERS, FILLER)[:, :-1], batch_BS[:, 1:]
        asked_BS = labels_BS >= ANSWERS
        level_B1 = torch.where(batch_BS < SYMBOLS, batch_BS, 0).amax(1, keepdim=True)
        found["level"].append(level_B1.expand_as(labels_BS)[asked_BS])
        said = loaded.model(inputs_BS, **({"output_blocks": True} if loaded.recursive else {}))
        logits_TBSV = said.block_logits if loaded.recursive else said.logits[None]
        right_TBS = logits_TBSV.argmax(-1) == labels_BS
        found["accuracy"].append(right_TBS[:, asked_BS])
        for level, all_right in zip(level_B1[:, 0].tolist(), (right_TBS[-1] | ~asked_BS).all(1).tolist(), strict=True):
            whole.setdefault(level, []).append(float(all_right))
            whole[None].append(float(all_right))
        if settings.exit is not None:
            left = loaded.model(inputs_BS, **settings.exit_arguments)
            found["exit accuracy"].append((left.logits.argmax(-1) == labels_BS)[asked_BS])
            found["exit block"].append(left.blocks[asked_BS])
    every = {name: torch.cat(parts, dim=-1) for name, parts in found.items() if parts}
    level_N, rows = every.pop("level"), []
    for level in [*level_N.unique().tolist(), None]:
        mine_N = torch.ones_like(level_N, dtype=torch.bool) if level is None else level_N == level
        means = {key: values[..., mine_N].double().mean(-1).tolist() for key, values in every.items()}
        rows.append({"level": level, "answers": int(mine_N.sum()), "whole": fmean(whole[level]), **means})
    return name, rows
