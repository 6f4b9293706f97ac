"""How a model does at a task's answers: accuracy by level and block, and where they leave under an exit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_recursive.data.tasks import ANSWERS, SYMBOLS, read_task
from megatron_recursive.errors import UserError
from megatron_recursive.inference.generation import Settings
from megatron_recursive.inference.loading import Loaded


@torch.no_grad()
def evaluate(
    loaded: Loaded, data: str, settings: Settings, *, batch_size: int = 256, documents: int | None = None
) -> dict[str, Any]:
    """Read the documents, each answer after the right ones before it.

    Args:
        settings: which exit; with one, documents are read once more, and every token of them leaves by it.
        documents: at most so many; None reads all.

    Returns:
        What a ``level`` is (hops), and ``rows``, one a level and one of all. Each has its ``level`` (None: all),
        ``answers``, ``accuracy`` after each block, and with an exit ``exit accuracy`` and ``exit block``, the mean over
        the answers of the blocks that they took.

    Raises:
        UserError: the data is no task, or does not fit the model.
    """
    name, ids = read_task(data)
    tokens_NS = torch.from_numpy(ids[:documents].astype("int64"))
    length, positions = tokens_NS.shape[1] - 1, loaded.max_positions
    if positions is not None and length > positions:
        raise UserError(f"--data {data} has documents of {length + 1} tokens, but {loaded.name} takes {positions}.")
    if int(tokens_NS.max()) >= loaded.model.config.vocab_size:
        raise UserError(f"--data {data} holds token ids that {loaded.name} does not have; name a model trained on it.")
    found: dict[str, list[Tensor]] = {"level": [], "right": [], "exit right": [], "exit block": []}
    for batch_BS in tokens_NS.to(loaded.model.device).split(batch_size):
        inputs_BS, labels_BS = batch_BS[:, :-1], batch_BS[:, 1:]
        asked_BS = labels_BS >= ANSWERS
        level_B1 = torch.where(batch_BS < SYMBOLS, batch_BS, 0).amax(1, keepdim=True)
        found["level"].append(level_B1.expand_as(labels_BS)[asked_BS])
        logits = loaded.model(inputs_BS, **({"output_blocks": True} if loaded.recursive else {}))
        logits_TBSV = logits.block_logits if loaded.recursive else logits.logits[None]
        found["right"].append((logits_TBSV.argmax(-1) == labels_BS)[:, asked_BS])
        if settings.exit is not None:
            left = loaded.model(inputs_BS, **settings.exit_arguments)
            found["exit right"].append((left.logits.argmax(-1) == labels_BS)[asked_BS])
            found["exit block"].append(left.blocks[asked_BS])
    every = {name: torch.cat(parts, dim=-1) for name, parts in found.items() if parts}
    return {"level": name, "rows": [_record(every, level) for level in [*every["level"].unique().tolist(), None]]}


def _record(every: dict[str, Tensor], level: int | None) -> dict[str, Any]:
    mine_N = torch.ones_like(every["level"], dtype=torch.bool) if level is None else every["level"] == level
    means = {name: values[..., mine_N].double().mean(-1).tolist() for name, values in every.items()}
    record = {"level": level, "answers": int(mine_N.sum()), "accuracy": means["right"]}
    if "exit block" in means:
        record.update({"exit accuracy": means["exit right"], "exit block": means["exit block"]})
    return record
