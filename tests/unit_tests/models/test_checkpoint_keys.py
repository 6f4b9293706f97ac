"""Under which keys a recursive model is stored: Megatron's own, and those of what it adds."""

from __future__ import annotations

from tests.distributed import run_distributed
from tests.models import Case, build_model, start_parallel

ADDED = {"halting_head.weight", "halting_head.bias", "initial_output", "initial_latent"}


def stored_keys() -> dict[str, list[str]]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from megatron_recursive.models.checkpoint_keys import adapt_sharded_state_dict, reading_checkpoint

    start_parallel()
    plain = build_model(Case(recursion={"enable_recursive_refinement": False}))
    recursive = build_model(Case(recursion={"state_norm": "none", "state_init": "trunc-normal"}))

    def keys(model: object) -> list[str]:
        sharded = model.sharded_state_dict()  # type: ignore[attr-defined]
        return sorted(value.key for value in sharded.values() if isinstance(value, ShardedTensor | ShardedObject))

    found = {"plain": keys(plain), "recursive": keys(recursive)}
    with reading_checkpoint():
        found["reading"] = keys(recursive)
    with reading_checkpoint(from_plain_gpt=True):
        found["reading a plain GPT"] = keys(recursive)
        of_the_base = {"decoder.vision_adapter.weight": "read"}
        found["a name that ends alike"] = [*adapt_sharded_state_dict(of_the_base, "").values()]
    return {**found, "again": keys(recursive)}


def test_keys() -> None:
    found = run_distributed(stored_keys, 1)[0]
    assert {"decoder.final_layernorm.weight", "embedding.word_embeddings.weight"} <= set(found["plain"])
    # The final norm is another module under --state-norm none, and the same parameter.
    assert set(found["recursive"]) == set(found["plain"]) | ADDED and found["again"] == found["recursive"]
    weights = {key for key in found["recursive"] if not key.endswith("_extra_state")}
    assert set(found["reading"]) == weights
    assert set(found["reading a plain GPT"]) == weights - ADDED
    assert found["a name that ends alike"] == ["read"]
