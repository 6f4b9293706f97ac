"""What a checkpoint may lack, and under which keys a moved parameter is stored.

Three things differ from Megatron's own sharded state, and only while a checkpoint is *read*:

* ``_extra_state`` entries are empty unless FP8 is on, and which modules have one depends on the layer spec (Megatron's
  local one or Transformer Engine's). They are not asked for, so that either spec reads what the other wrote.
* adapters (``low_rank.py``) stay as initialised where the checkpoint is of the base that they shall adapt.
* with ``--init-from-gpt``, what a plain GPT does not have (``plan/added_parameters.py``) stays as initialised.

What is written is always Megatron's full state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding

from megatron_recursive.plan.added_parameters import EVERY
from megatron_recursive.plan.lora import MODULE as ADAPTERS

NEW_IN_RECURSIVE_MODELS = tuple(each.key for each in EVERY)

_reading: list[tuple[bool, bool]] = []  # a stack of what may be lacking, a recursion or adapters; empty: no reading


@contextlib.contextmanager
def reading_checkpoint(*, from_plain_gpt: bool = False, without_adapters: bool = False) -> Iterator[None]:
    """Sharded state made inside this context is for reading a checkpoint."""
    _reading.append((from_plain_gpt, without_adapters))
    try:
        yield
    finally:
        _reading.pop()


def adapt_sharded_state_dict(sharded: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Apply the rules of this module to a model's sharded state, in place."""
    # The final norm moved out of the decoder (--state-norm none) but is the same parameter.
    moved = {k: v for k, v in sharded.items() if k.startswith(f"{prefix}output_norm.")}
    replace_prefix_for_sharding(moved, f"{prefix}output_norm.", f"{prefix}decoder.final_layernorm.")
    if _reading:
        from_plain_gpt, without_adapters = _reading[-1]
        for key, value in sharded.items():
            is_new = from_plain_gpt and key.removeprefix(prefix) in NEW_IN_RECURSIVE_MODELS
            if key.endswith("_extra_state") and isinstance(value, ShardedObject):
                sharded[key] = LocalNonpersistentObject(value.data)
            elif is_new or (without_adapters and f".{ADAPTERS}." in key):
                sharded[key] = LocalNonpersistentObject(value.data)
    return sharded
