"""What the ring is tested on, and how it is spread over ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_recursive.plan import DecoderPass, RecursionPlan
from tests.models import Case, Layout

# See models/test_parallel.py for the reasons of these numbers.
ADAM = {"lr": 1e-2, "clip_grad": 0.1, "weight_decay": 0.01, "adam_eps": 1e-5}
TRAINED: dict[str, Any] = {"optimizer": ADAM, "steps": 2, "evaluate": True}
FULL = {"detach_between_refinements": False}
UNTIED = {"share_embeddings_and_output_weights": False}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


def times_eight(loss: Any) -> Any:
    """A loss scaler's scale."""
    return loss * 8.0


SCALED = {"grad_scale_func": times_eight}
PER_TOKEN = {"calculate_per_token_loss": True}


def supervised_plan(*, halting: bool, cuts: bool = False, free_blocks: int = 0) -> RecursionPlan:
    """A loss after each of three blocks (one latent pass, one output pass), behind ``free_blocks`` without gradient."""
    passes: list[DecoderPass] = []
    weights = (0.0,) * free_blocks + (0.3, 0.5, 0.7)
    for block, weight in enumerate(weights):
        halt_weight = 1.0 / len(weights) if halting else 0.0
        common: dict[str, Any] = {"block": block, "grad": block >= free_blocks}
        cut = block > 0 and (cuts or block == free_blocks)
        reads = ("output", "latent", "input")
        passes.append(DecoderPass(len(passes), target="latent", reads=reads, cuts_states=cut, **common))
        passes.append(DecoderPass(len(passes), target="output", reads=reads[:2], supervised_weight=weight,
                                  halt_weight=halt_weight, **common))  # fmt: skip
    return RecursionPlan("core", tuple(passes), embedding_multiplier=3.0)


SUPERVISED = supervised_plan(halting=False)
SUPERVISED_HALTING = supervised_plan(halting=True)
SUPERVISED_CUT = supervised_plan(halting=True, cuts=True)  # deep supervision: blocks learn apart
SUPERVISED_AFTER_FREE = supervised_plan(halting=True, cuts=True, free_blocks=2)

def plan_of(*passes: tuple[str, tuple[str, ...]], free: int = 0) -> RecursionPlan:
    """A plan of one block from (target, reads) pairs, of which the first ``free`` carry no gradient."""
    made = [DecoderPass(i, 0, target, reads, grad=i >= free) for i, (target, reads) in enumerate(passes)]
    made[-1] = replace(made[-1], supervised_weight=1.0)
    return RecursionPlan("core", tuple(made), embedding_multiplier=3.0)


ALL_STATES, TWO_STATES = ("output", "latent", "input"), ("output", "latent")
ODD_PLANS: dict[str, RecursionPlan] = {
    # the first pass with gradient does not read the embedding, a later one does
    "blind-start": plan_of(("latent", ALL_STATES), ("output", TWO_STATES), ("latent", ALL_STATES),
                           ("output", TWO_STATES), free=1),
    "blind-start-full": plan_of(("output", TWO_STATES), ("latent", ALL_STATES), ("output", TWO_STATES)),
    # a result that nobody reads: overwritten at once, or never read again
    "overwritten": plan_of(("latent", ALL_STATES), ("latent", ("output", "input")), ("output", TWO_STATES)),
    "unread": plan_of(("output", ALL_STATES), ("latent", ALL_STATES), ("output", ("output", "input"))),
    # too few passes for two phases
    "one-pass-with-gradient": plan_of(("output", ("output", "input")), ("output", ("output", "input")), free=1),
}  # fmt: skip

CASES: dict[str, Case] = {
    # gradient flow, embeddings, states
    "detach": Case(**TRAINED),
    "full": Case(FULL, **TRAINED),
    "full-untied": Case(FULL, model=UNTIED, evaluate=True),
    "none-trunc-normal-untied": Case({"state_init": "trunc-normal", "state_norm": "none"}, model=UNTIED, **TRAINED),
    "none-trunc-normal-full": Case({"state_init": "trunc-normal", "state_norm": "none", **FULL}, evaluate=True),
    "deep": Case({"num_refinement_blocks": 4, "num_latent_refinements": 1}, evaluate=True),
    "two-passes": Case({"num_refinement_blocks": 1, "num_latent_refinements": 1}, **TRAINED),
    # halting
    "no-halting": Case({"halt_loss_weight": 0.0}, evaluate=True),
    "no-halting-full": Case({"halt_loss_weight": 0.0, **FULL}, evaluate=True),
    "halting-last": Case({"halt_supervision": "last", "num_refinement_blocks": 3}, evaluate=True),
    "halting-last-full": Case({"halt_supervision": "last", **FULL}, model=UNTIED, evaluate=True),
    "halting-agrees": Case({"halt_target": "agrees-with-last", "num_refinement_blocks": 3}, evaluate=True),
    "halting-agrees-none": Case({"halt_target": "agrees-with-last", "state_norm": "none", **FULL}, evaluate=True),
    # a loss after every block
    "supervised": Case(plan=SUPERVISED, **TRAINED),
    "supervised-halting": Case(plan=SUPERVISED_HALTING, evaluate=True),
    "supervised-cut": Case(plan=SUPERVISED_CUT, model=UNTIED, **TRAINED),
    "supervised-after-free": Case(plan=SUPERVISED_AFTER_FREE, evaluate=True),
    "supervised-after-free-per-token": Case(plan=SUPERVISED_AFTER_FREE, transformer={**SCALED, **PER_TOKEN}),
    "supervised-none": Case({"state_norm": "none"}, plan=replace(SUPERVISED_HALTING, state_norm="none"), evaluate=True),
    "supervised-per-token": Case(plan=SUPERVISED, transformer=PER_TOKEN, **TRAINED),
    "supervised-scaled": Case(plan=SUPERVISED_HALTING, transformer=SCALED, model=UNTIED),
    "supervised-scaled-per-token": Case(plan=SUPERVISED_CUT, transformer={**SCALED, **PER_TOKEN}),
    "supervised-recompute": Case(plan=SUPERVISED_HALTING, transformer=FULL_RECOMPUTE),
    # how the loss is reduced
    "per-token": Case(transformer=PER_TOKEN, **TRAINED),
    "scaled": Case(transformer=SCALED, evaluate=True),
    # micro-batches; from the seventh on, all tokens are masked
    "2-micro-batches": Case(micro_batches=2, evaluate=True),
    "2-micro-batches-full": Case(FULL, micro_batches=2, evaluate=True),
    "5-micro-batches": Case(micro_batches=5, **TRAINED),
    "5-micro-batches-full": Case(FULL, micro_batches=5, evaluate=True),
    "5-micro-batches-supervised": Case(plan=SUPERVISED_CUT, micro_batches=5, evaluate=True),
    "8-micro-batches": Case(micro_batches=8, evaluate=True),
    "8-micro-batches-per-token": Case(transformer=PER_TOKEN, micro_batches=8, **TRAINED),
    "8-micro-batches-supervised": Case(plan=SUPERVISED_HALTING, micro_batches=8, evaluate=True),
    # layers
    "recompute": Case(transformer=FULL_RECOMPUTE, evaluate=True),
    "recompute-full": Case(FULL, transformer=FULL_RECOMPUTE),
    "recompute-selective-full": Case(FULL, transformer=SELECTIVE_RECOMPUTE),
    "llama-like": Case(
        FULL,
        transformer={"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "num_query_groups": 2},
        model=UNTIED,
        evaluate=True,
    ),
    "learned-positions": Case(model={"position_embedding_type": "learned_absolute"}, **TRAINED),
    "documents": Case(documents=True, evaluate=True),
    "documents-full": Case(FULL, documents=True, transformer=FULL_RECOMPUTE, evaluate=True),
    **{name: Case(plan=plan, evaluate=True) for name, plan in ODD_PLANS.items()},
    "unread-recompute": Case(plan=ODD_PLANS["unread"], transformer=FULL_RECOMPUTE),
}

THREE_LAYERS, FOUR_LAYERS = {"num_layers": 3}, {"num_layers": 4}
THREE_LAYER_CASES: dict[str, Case] = {
    "3-layers": Case(transformer=THREE_LAYERS, evaluate=True),
    "3-layers-full": Case(FULL, transformer=THREE_LAYERS, model=UNTIED, evaluate=True),
    "3-layers-supervised": Case(plan=SUPERVISED_HALTING, transformer=THREE_LAYERS, evaluate=True),
}
FOUR_LAYER_CASES: dict[str, Case] = {
    "4-layers": Case(transformer=FOUR_LAYERS, micro_batches=8, **TRAINED),
    "4-layers-full-untied": Case(FULL, transformer=FOUR_LAYERS, model=UNTIED, evaluate=True),
    "4-layers-none-5-micro-batches": Case(
        {"state_norm": "none", "state_init": "trunc-normal"}, transformer=FOUR_LAYERS, micro_batches=5, evaluate=True
    ),
    "4-layers-supervised-cut": Case(plan=SUPERVISED_CUT, transformer=FOUR_LAYERS, evaluate=True),
    "4-layers-6-micro-batches-recompute": Case(
        FULL, transformer={**FOUR_LAYERS, **FULL_RECOMPUTE}, micro_batches=6
    ),
}
ALL_CASES = {**CASES, **THREE_LAYER_CASES, **FOUR_LAYER_CASES}

BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 2000}
OVERLAP = {**BUCKETS, "use_distributed_optimizer": True, "overlap_param_gather": True}
# Plans whose passes all carry gradient run in one phase on any layout; these would take two at four micro-batches.
ON_ONE_PHASE = ("detach", "none-trunc-normal-untied", "halting-agrees", "supervised-after-free", "8-micro-batches",
                "recompute")  # fmt: skip
ON_TWO_PHASES = ("2-micro-batches", "5-micro-batches", "supervised-after-free", "blind-start", "one-pass-with-gradient")
ON_WINDOWS = ("detach", "per-token", "5-micro-batches", "8-micro-batches", "scaled", "supervised-after-free",
              "supervised-after-free-per-token", "blind-start", "halting-agrees", "recompute")  # fmt: skip
ON_OVERLAP = ("detach", "full", "none-trunc-normal-untied", "supervised-cut", "5-micro-batches")
# What does not meet tensor parallelism elsewhere in the model: the halting head's arg-max, injected losses, copies.
ON_TENSOR_PARALLEL = ("detach", "full-untied", "halting-agrees-none")
ON_SEQUENCE_PARALLEL = ("detach", "none-trunc-normal-untied", "supervised-cut", "halting-agrees-none")
ON_REPLAYED_PASSES = ("detach", "full", "none-trunc-normal-full", "supervised-cut", "supervised-scaled", "llama-like",
                      "5-micro-batches-full", "documents-full", "blind-start", "unread")  # fmt: skip
ON_DATA_PARALLEL = ("detach", "full", "supervised-cut", "supervised-per-token", "none-trunc-normal-untied")

# Layout -> (number of ranks, layout, cases).
LAYOUTS: dict[str, tuple[int, Layout, list[str]]] = {
    "pp2": (2, Layout(pp=2), [*CASES]),
    "pp2-one-phase": (2, Layout(pp=2, phases="one"), [*ON_ONE_PHASE]),
    "pp2-two-phases": (2, Layout(pp=2, phases="two"), [*ON_TWO_PHASES]),
    "pp2-windows": (2, Layout(pp=2, phases="two", window=2), [*ON_WINDOWS]),
    "pp2-recompute-passes": (2, Layout(pp=2, recompute_passes=True), [*ON_REPLAYED_PASSES]),
    "pp2-overlap-grad-reduce": (2, Layout(pp=2, ddp=BUCKETS), [*ON_OVERLAP]),
    "pp2-first-1": (2, Layout(pp=2, stages={"num_layers_in_first_pipeline_stage": 1}), [*THREE_LAYER_CASES]),
    "pp2-last-1": (2, Layout(pp=2, stages={"num_layers_in_last_pipeline_stage": 1}), [*THREE_LAYER_CASES]),
    "pp3": (3, Layout(pp=3), [*THREE_LAYER_CASES]),
    "pp4": (4, Layout(pp=4), [*FOUR_LAYER_CASES]),
    "pp4-windows": (4, Layout(pp=4, phases="two", window=4), ["4-layers", "4-layers-none-5-micro-batches"]),
    "pp4-recompute-passes": (4, Layout(pp=4, recompute_passes=True), ["4-layers-full-untied",
                                                                      "4-layers-6-micro-batches-recompute"]),
    "pp2-tp2-sp-recompute-passes": (4, Layout(tp=2, pp=2, sequence_parallel=True, recompute_passes=True),
                                    ["full-untied", "supervised-cut"]),
    "pp2-tp2": (4, Layout(tp=2, pp=2), [*ON_TENSOR_PARALLEL]),
    "pp2-tp2-sp": (4, Layout(tp=2, pp=2, sequence_parallel=True), [*ON_SEQUENCE_PARALLEL]),
    "pp2-dp2": (4, Layout(pp=2, ddp=OVERLAP), [*ON_DATA_PARALLEL]),
    "pp2-dp2-two-phases": (4, Layout(pp=2, ddp=OVERLAP, phases="two"), ["detach", "none-trunc-normal-untied"]),
    "pp2-dp2-windows": (4, Layout(pp=2, ddp={**OVERLAP, "bucket_size": 2000}, phases="two", window=2), [
        "8-micro-batches", "8-micro-batches-per-token"]),
    "pp2-tp2-sp-windows": (4, Layout(tp=2, pp=2, sequence_parallel=True, phases="two", window=2), ["detach"]),
}  # fmt: skip

# One of each kind, for the quick tests: gradient flow, states, halting, losses, micro-batches, layers; every layout's.
QUICK = [("pp2", name) for name in (
    "detach", "full", "none-trunc-normal-untied", "halting-agrees", "supervised-cut", "5-micro-batches",
    "documents-full",
)] + [
    ("pp2-windows", "supervised-after-free-per-token"),
    ("pp2-dp2-windows", "8-micro-batches-per-token"),
    ("pp2-recompute-passes", "none-trunc-normal-full"), ("pp2-first-1", "3-layers-full"),
    ("pp4", "4-layers-none-5-micro-batches"), ("pp2-tp2-sp", "halting-agrees-none"),
]  # fmt: skip
