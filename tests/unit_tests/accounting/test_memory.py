"""Theoretical memory against what autograd saves, and against the tensors that models and optimizers hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_recursive.accounting import ModelShape, Recording, StageMemory, StateBytes, stage_memory
from megatron_recursive.accounting.memory import hidden_bytes
from megatron_recursive.plan import build_plan
from tests.distributed import run_distributed
from tests.grids import chosen, grid
from tests.models import Case, Layout, build_optimizer, build_wrapped, run_schedule
from tests.unit_tests.accounting.test_params import shape_of

# Wide enough that what is left out (a few numbers per token, rotary tables) stays below the tolerance.
HIDDEN, HEADS, FFN, SEQ, MICRO_BATCH = 64, 8, 256, 64, 4
TOLERANCE = 0.1
WIDE = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "ffn_hidden_size": FFN}
LLAMA_LIKE = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "num_query_groups": 4}
DEEP = {"enable_deep_supervision": True}
FULL = {"detach_between_refinements": False}
RECURRENT = {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_recurrences": 5}
REPLAY = {"recompute_granularity": "full", "recompute_method": "uniform"}


@dataclass(frozen=True)
class Measured:
    """A case of the comparison: the model, how it is spread, and what the formula is told of it."""

    recursion: Mapping[str, Any] = field(default_factory=dict)
    transformer: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)
    recording: Mapping[str, Any] = field(default_factory=dict)
    documents: bool = False
    micro_batches: int = 1

    @property
    def case(self) -> Case:
        return Case(self.recursion, transformer={**WIDE, **self.transformer}, micro_batches=self.micro_batches)

    @property
    def shape(self) -> ModelShape:
        values = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "ffn_hidden_size": FFN, "seq_length": SEQ}
        groups = self.transformer.get("num_query_groups", HEADS)
        return replace(shape_of(self.case), **values, num_query_groups=groups, kv_channels=HIDDEN // HEADS)


CASES = {
    "detached": Measured(),
    "full gradient": Measured(FULL),
    "three blocks": Measured({"num_refinement_blocks": 3}),
    "no halting": Measured({"halt_loss_weight": 0.0}),
    "dropout": Measured(transformer={"hidden_dropout": 0.1}, recording={"dropout_mask": 4}),
    "llama-like": Measured(transformer=LLAMA_LIKE, recording={"splits_norm": True, "splits_activation": True}),
    "gated attention": Measured(transformer={"attention_output_gate": True}),
    "gated attention, bf16": Measured(
        transformer={"attention_output_gate": True, "bf16": True}, recording={"element": 2}
    ),
    "fused activation": Measured(
        transformer={**LLAMA_LIKE, "bias_activation_fusion": True}, recording={"splits_norm": True}
    ),
    "concat": Measured({**RECURRENT, "injection": "concat", "state_norm": "core"}, {"num_layers": 3}),
    "diagonal, replay passes": Measured(
        {**RECURRENT, "injection": "diagonal", "state_norm": "core-end"}, {"num_layers": 3},
        Layout(recompute_passes=True), {"recompute_passes": True},
    ),
    "boundary gate": Measured({**RECURRENT, "boundary": "gate"}, {"num_layers": 3}),
    "boundary norm": Measured({**RECURRENT, "boundary": "norm-inject"}, {"num_layers": 3}),
    "norm once": Measured({"state_norm": "none"}),
    "supervised": Measured({**DEEP, "num_refinement_blocks": 4, **FULL}),
    "supervised apart, norm once": Measured({**DEEP, "num_refinement_blocks": 3, "state_norm": "none"}),
    "ring, supervised": Measured({**DEEP, **FULL}, {"num_layers": 4}, Layout(pp=2), micro_batches=4),
    "exit gate": Measured({"recursion_family": "looped", "exit_gate": True, "num_refinement_blocks": 3}),
    "documents": Measured(documents=True),
    "bf16": Measured(transformer={"bf16": True}, recording={"element": 2}),
    "replay passes": Measured(FULL, layout=Layout(recompute_passes=True), recording={"recompute_passes": True}),
    "replay layers": Measured(
        FULL, {**REPLAY, "recompute_num_layers": 1, "num_layers": 3}, recording={"recompute_layers": 1}
    ),
    "replay two layers at once": Measured(
        FULL, {**REPLAY, "recompute_num_layers": 2, "num_layers": 3}, recording={"recompute_layers": 2}
    ),
    "replay one of three layers": Measured(
        FULL, {**REPLAY, "recompute_method": "block", "recompute_num_layers": 1, "num_layers": 3},
        recording={"recompute_block": 1},
    ),
    "replay passes and layers": Measured(
        FULL, {**REPLAY, "recompute_num_layers": 1, "num_layers": 3}, Layout(recompute_passes=True),
        {"recompute_layers": 1, "recompute_passes": True},
    ),
    "replay MLP": Measured(
        transformer={"recompute_granularity": "selective", "recompute_modules": ["mlp"], "add_bias_linear": False},
        recording={"recompute_mlp": True},
    ),
    "TP 2": Measured(layout=Layout(tp=2), recording={"tensor_parallel": 2}),
    "TP 2, SP": Measured(
        layout=Layout(tp=2, sequence_parallel=True), recording={"tensor_parallel": 2, "sequence_parallel": True}
    ),
    "ring, one phase": Measured(FULL, {"num_layers": 4}, Layout(pp=2, phases="one"), micro_batches=4),
    "ring, two phases": Measured({}, {"num_layers": 4}, Layout(pp=2, phases="two"), micro_batches=4),
    "ring, prelude and coda": Measured(
        {"recursion_family": "recurrent", "num_prelude_layers": 1, "num_coda_layers": 1, "num_recurrences": 3,
         "injection": "add"}, {"num_layers": 4}, Layout(pp=2), micro_batches=4,
    ),
    "ring, replay passes": Measured(
        FULL, {"num_layers": 4}, Layout(pp=2, phases="one", recompute_passes=True), {"recompute_passes": True},
        micro_batches=4,
    ),
}  # fmt: skip


class Saved:
    """Bytes of the storages that autograd keeps, each counted once, and their peak. Parameters do not count."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.holders: dict[int, int] = {}
        self.bytes = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in self.parameters:
            return tensor
        return Holder(self, tensor)

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        return packed.tensor if isinstance(packed, Holder) else packed


class Holder:
    """A saved tensor; it lives as long as its graph."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        storage = tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        held = saved.holders.get(self.key, 0)
        saved.holders[self.key] = held + 1
        if not held:
            saved.bytes += self.size
            saved.peak = max(saved.peak, saved.bytes)

    def __del__(self) -> None:
        held = self.saved.holders[self.key] = self.saved.holders[self.key] - 1
        if not held:
            self.saved.bytes -= self.size


def saved_bytes(names: list[str]) -> dict[str, int]:
    """The peak of what autograd keeps in one training step of each case, on this rank."""
    import tests.models as models

    models.SEQ, models.MICRO_BATCH = SEQ, MICRO_BATCH  # of this worker's batches, for the length of this job
    try:
        return {name: _saved_bytes(CASES[name]) for name in names}
    finally:
        models.SEQ, models.MICRO_BATCH = 16, 2


def _saved_bytes(measured: Measured) -> int:
    case = replace(measured.case, documents=measured.documents)
    wrapped = build_wrapped(case, measured.layout)
    run_schedule(wrapped, case)  # buffers that are made once
    saved = Saved(wrapped)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        run_schedule(wrapped, case, 1)
    return saved.peak


@pytest.fixture(scope="module")
def all_saved_bytes(request: pytest.FixtureRequest) -> dict[str, list[int]]:
    """Case to the peak on every pipeline stage (of its first tensor-parallel rank)."""
    found: dict[str, list[int]] = {}
    asked = [name for (name,) in chosen(request, "name")]
    for ranks in (1, 2):
        names = [name for name in asked if CASES[name].layout.tp * CASES[name].layout.pp == ranks]
        by_rank = run_distributed(saved_bytes, ranks, names, timeout=120)
        for name in names:
            found[name] = [by_rank[stage * CASES[name].layout.tp][name] for stage in range(CASES[name].layout.pp)]
    return found


def predicted(measured: Measured, vocabulary: int | None = None) -> list[StageMemory]:
    recording = replace(Recording(micro_batch=MICRO_BATCH, element=4), **measured.recording)
    plan = build_plan(measured.case.resolved_recursion())
    stages, held = measured.layout.pp, None
    shape = measured.shape if vocabulary is None else replace(measured.shape, vocab_size=vocabulary)
    split = [shape.num_layers // stages] * stages
    if stages > 1:
        from megatron_recursive.pipeline.pass_costs import equal_costs
        from megatron_recursive.pipeline.windows import most_held

        windows = (measured.micro_batches,) * (measured.layout.phases == "two")
        grad = equal_costs(plan, stages, layers_per_stage=split).grad
        held = partial(most_held, grad, stages, measured.micro_batches, windows)
    return stage_memory(
        shape, plan, recording, StateBytes(), layers_per_stage=split, most_held=held,
        in_flight=measured.micro_batches if stages > 1 else 1, window=measured.micro_batches * (stages > 1),
    )  # fmt: skip


QUICK = ("detached", "llama-like", "bf16", "replay passes and layers", "TP 2, SP", "ring, two phases",
         "ring, prelude and coda")


@pytest.mark.parametrize("name", grid(CASES, QUICK))
def test_activations_are_what_autograd_saves(all_saved_bytes: dict[str, list[int]], name: str) -> None:
    """The states of the first stage are held by Python, not saved by autograd."""
    stages = predicted(CASES[name])
    for stage, (memory, measured) in enumerate(zip(stages, all_saved_bytes[name], strict=True)):
        expected = memory.activations - memory.states
        assert measured == pytest.approx(expected, rel=TOLERANCE), (stage, memory, measured / expected)


# --- all that is there at the peak, kept by autograd or not ----------------------------------------------------------

WIDE_VOCABULARY = 2048  # logits as large as what several layers keep, as in a real model
LIVE = {
    "heads": Measured(transformer={"bf16": True}),
    "heads, full gradient": Measured(FULL, {"bf16": True}),
    "heads, replay passes": Measured(FULL, {"bf16": True}, Layout(recompute_passes=True), {"recompute_passes": True}),
    "supervised": Measured({**DEEP, "num_refinement_blocks": 4}, {"bf16": True}),
    "a replay": Measured(
        FULL, {"bf16": True, "num_layers": 12}, Layout(recompute_passes=True), {"recompute_passes": True}
    ),
}  # fmt: skip


class Live(TorchDispatchMode):
    """Bytes of the storages that a step makes, and their peak; those of ``known`` do not count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def forget(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.bytes -= nbytes


def live_bytes() -> dict[str, int]:
    """The peak of each case in the second of two steps."""
    import tests.models as models

    found, usual = {}, (models.SEQ, models.MICRO_BATCH, models.VOCAB)
    models.SEQ, models.MICRO_BATCH, models.VOCAB = SEQ, MICRO_BATCH, WIDE_VOCABULARY
    try:
        for name, measured in LIVE.items():
            wrapped = build_wrapped(measured.case, measured.layout)
            run_schedule(wrapped, measured.case)
            known = [*wrapped.parameters(), *wrapped.module.buffers(), *(each.grad_data for each in wrapped.buffers)]
            with Live(known) as live:
                run_schedule(wrapped, measured.case, 1)
            found[name] = live.peak
    finally:
        models.SEQ, models.MICRO_BATCH, models.VOCAB = usual
    return found


@pytest.mark.grid
def test_the_peak_of_a_step_is_what_is_counted() -> None:
    """Logits in bf16 beside their fp32 copy, and neither while a pass is replayed."""
    for name, peak in run_distributed(live_bytes, 1, timeout=120)[0].items():
        (memory,) = predicted(replace(LIVE[name], recording={"element": 2, **LIVE[name].recording}), WIDE_VOCABULARY)
        assert (memory.replay > memory.heads) == (name == "a replay")
        assert peak == pytest.approx(memory.activations, rel=TOLERANCE / 2), (name, memory, peak / memory.activations)


# --- weights --------------------------------------------------------------------------------------------------------

ADAM = {"optimizer": {"lr": 1e-3}}
WEIGHTS: dict[str, tuple[Case, Layout, StateBytes]] = {
    "fp32": (Case(**ADAM), Layout(), StateBytes(4, 4, 8)),
    "bf16": (Case(transformer={"bf16": True}, **ADAM), Layout(), StateBytes(2, 4, 12)),
    "TP 2": (Case(**ADAM), Layout(tp=2), StateBytes(4, 4, 8)),
    "untied, PP 2": (
        Case(model={"share_embeddings_and_output_weights": False}, **ADAM), Layout(pp=2), StateBytes(4, 4, 8),
    ),
    "tied, PP 2": (Case(**ADAM), Layout(pp=2), StateBytes(4, 4, 8)),
    "distributed optimizer": (
        Case(**ADAM), Layout(ddp={"use_distributed_optimizer": True}), StateBytes(4, 4, 8, optimizer_shards=2),
    ),
    "distributed optimizer, bf16": (
        Case(transformer={"bf16": True}, **ADAM), Layout(ddp={"use_distributed_optimizer": True}),
        StateBytes(2, 4, 12, optimizer_shards=2),
    ),
}  # fmt: skip


def held_bytes(names: list[str]) -> dict[str, int]:
    """Bytes of parameters, gradient buffers and optimizer states after one step, on this rank."""
    found = {}
    for name in names:
        case, layout, _ = WEIGHTS[name]
        wrapped = build_wrapped(case, layout)
        optimizer = build_optimizer(case, layout, wrapped)
        run_schedule(wrapped, case)
        optimizer.step()
        tensors = list(wrapped.parameters())
        tensors += [buffer.grad_data for buffer in wrapped.buffers]
        for each in getattr(optimizer, "chained_optimizers", [optimizer]):
            for group in each.optimizer.param_groups:
                tensors += group["params"]
                for parameter in group["params"]:
                    tensors += [v for v in each.optimizer.state[parameter].values() if torch.is_tensor(v) and v.dim()]
        # A fp32 parameter and the optimizer's view of it share a storage.
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        found[name] = sum(storages.values())
    return found


def test_weights_are_what_a_rank_holds() -> None:
    """Within 3%: buckets are padded, and a shard may end in the middle of a parameter."""
    for ranks, names in {1: ["fp32", "bf16"], 2: [name for name in WEIGHTS if name not in ("fp32", "bf16")]}.items():
        by_rank = run_distributed(held_bytes, ranks, names, timeout=120)
        for name in names:
            case, layout, state = WEIGHTS[name]
            recording = Recording(micro_batch=2, tensor_parallel=layout.tp)
            plan, shape = build_plan(case.resolved_recursion()), shape_of(case)
            split = [shape.num_layers // layout.pp] * layout.pp
            stages = stage_memory(shape, plan, recording, state, layers_per_stage=split)
            shards = [sum(r[name] for r in by_rank) / len(by_rank)] if layout.pp == 1 else [r[name] for r in by_rank]
            for memory, held in zip(stages, shards, strict=True):
                assert held == pytest.approx(memory.weights, rel=0.03), name


def test_passes_cost_activations_and_no_weights() -> None:
    shape = shape_of(Case())
    recording, state = Recording(micro_batch=2), StateBytes()
    plans = [build_plan(Case({**FULL, "num_refinement_blocks": n}).resolved_recursion()) for n in (2, 4)]
    few, many = (stage_memory(shape, plan, recording, state) for plan in plans)
    assert many[0].weights == few[0].weights and many[0].decoder == 2 * few[0].decoder
    detached = build_plan(Case({"num_refinement_blocks": 4}).resolved_recursion())
    (memory,) = stage_memory(shape, detached, recording, state)
    assert memory.decoder == few[0].decoder / 2


@pytest.mark.parametrize(("halting", "states"), [("all", 3), ("last", 1)])
def test_a_micro_batch_that_waits_has_a_state_on_the_last_stage(halting: str, states: int) -> None:
    """What a block changed is told of the one before, whether or not a halting head learns there."""
    knobs = {**FULL, "num_refinement_blocks": 4, "halt_supervision": halting}
    plan, shape = build_plan(Case(knobs).resolved_recursion()), shape_of(Case(knobs))
    record = Recording(micro_batch=2)
    few, many = (stage_memory(shape, plan, record, StateBytes(), layers_per_stage=[1, 1], window=w) for w in (8, 16))
    assert many[1].heads - few[1].heads == 8 * states * hidden_bytes(shape, record)
