"""The invariants of a plan, its JSON form, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.plan import DecoderPass, RecursionConfig, RecursionPlan, build_plan
from megatron_recursive.plan.added_parameters import added_parameters, sampled_start, tokens_so_far

CUT = {"detach_between_refinements": True}


def make_plan(blocks: int = 2, latents: int = 2, **knobs: object) -> RecursionPlan:
    config = RecursionConfig(num_refinement_blocks=blocks, num_latent_refinements=latents, **knobs)  # type: ignore[arg-type]
    return build_plan(config.resolved(embedding_init_std=0.02))


def test_a_plan_written_out() -> None:
    """Two latent passes and an output pass a block: cut, the last block learns; both are asked whether they halt."""
    plan, all_states, own = make_plan(2, 2, **CUT), ("output", "latent", "input"), ("output", "latent")
    written = [
        (0, "latent", all_states, False, False, 0.0, 0.0),
        (0, "latent", all_states, False, False, 0.0, 0.0),
        (0, "output", own, False, False, 0.0, 0.5),
        (1, "latent", all_states, True, True, 0.0, 0.0),
        (1, "latent", all_states, True, False, 0.0, 0.0),
        (1, "output", own, True, False, 1.0, 0.5),
    ]
    found = [(p.block, p.target, p.reads, p.grad, p.cuts_states, p.supervised_weight, p.halt_weight)
             for p in plan.passes]  # fmt: skip
    assert found == written and [p.index for p in plan.passes] == list(range(6))
    assert plan.family == "core" and not plan.is_plain and (plan.num_passes, plan.num_blocks) == (6, 2)
    assert plan.grad_passes[0].index == 3 and plan.grad_passes == plan.passes[3:]
    assert plan.block_ends == (plan.passes[2], plan.passes[5])
    assert [p.index for p in plan.passes if plan.is_block_end(p)] == [2, 5]


def test_full_gradient_cuts_nothing_and_halting_may_be_asked_once() -> None:
    plan = make_plan(3, 1, halt_supervision="last")
    assert all(p.grad and not p.cuts_states for p in plan.passes) and plan.grad_passes[0].index == 0
    assert [p.halt_weight for p in plan.passes] == [0.0] * 5 + [1.0]
    assert all(plan.gradient_groups(tied_embeddings=False).values())


def test_plain_plan() -> None:
    plan = make_plan(enable_recursive_refinement=False)
    assert plan.is_plain and plan.num_passes == plan.num_blocks == 1 and not plan.has_halting
    assert plan.embedding_multiplier == 1.0 and plan.passes[0].reads == ("input",)
    assert plan.gradient_groups(tied_embeddings=False) == {"embedding": True, "layers": True, "output head": True}


def test_no_halting_loss_no_halting() -> None:
    plan = make_plan(halt_loss_weight=0.0)
    assert not plan.has_halting and "halting head" not in plan.gradient_groups(tied_embeddings=True)
    assert make_plan().gradient_groups(tied_embeddings=False)["halting head"]


def test_what_holds_for_all_passes_comes_from_the_config() -> None:
    plan = make_plan(state_init="trunc-normal", state_norm="none")
    assert (plan.state_init, plan.state_norm, plan.embedding_multiplier) == ("trunc-normal", "none", 50.0)


def test_a_plan_is_frozen_and_hashable() -> None:
    assert hash(make_plan()) == hash(make_plan()) and make_plan() == make_plan() != make_plan(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_plan().family = "other"  # type: ignore[misc]


@pytest.mark.parametrize("blocks", [1, 3])
def test_json_round_trip(blocks: int) -> None:
    plan = make_plan(blocks, state_init="trunc-normal", detach_between_refinements=False)
    assert RecursionPlan.from_json(plan.to_json()) == plan
    unsaid = {"stacks", "mean_steps", "exit_gate", "state_std"}  # where usual
    words = {field.name for field in dataclasses.fields(RecursionPlan)} - unsaid
    assert set(json.loads(plan.to_json())) == words


def broken_json(**changes: object) -> str:
    return json.dumps({**json.loads(make_plan().to_json()), **changes})


GARBAGE = {
    "not json": "][", "empty": "", "a number": "3", "null": "null", "a list": "[1, 2]", "a string": '"core"',
    "no passes": "{}", "passes null": broken_json(passes=None), "passes a number": broken_json(passes=1),
    "passes of numbers": broken_json(passes=[1]), "passes of text": broken_json(passes="abc"),
    "an empty pass": broken_json(passes=[{}]), "no pass at all": broken_json(passes=[]),
    "an unknown field": broken_json(depth=3),
    "an unknown field of a pass": broken_json(passes=[{"reads": ["input"], "colour": 1}]),
    "reads a number": broken_json(passes=[{"reads": 1}]),
}  # fmt: skip


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_no_plan(text: str) -> None:
    with pytest.raises(UserError):
        RecursionPlan.from_json(text)


def replaced(place: int, **changes: object) -> tuple[DecoderPass, ...]:
    passes = list(make_plan(**CUT).passes)  # latent, latent, output; latent, latent, output (with gradient)
    passes[place] = dataclasses.replace(passes[place], **changes)  # type: ignore[arg-type]
    return tuple(passes)


REFUSED = {
    "nothing": ((), "--num-refinement-blocks"),
    "numbering": (replaced(2, index=7), "Pass 2 of the plan is numbered 7"),
    "block jump": (replaced(5, block=4), "jumps to block 4"),
    "block back": (replaced(4, block=0), "Pass 4 of the plan jumps to block 0"),
    "target": (replaced(1, target="memory"), "'memory'"),
    "no reads": (replaced(1, reads=()), "must read"),
    "reads": (replaced(1, reads=("output", "memory")), "must read"),
    "supervised latent": (replaced(4, supervised_weight=1.0), "does not update the output"),
    "halting latent": (replaced(1, halt_weight=1.0), "does not update the output"),
    "supervised without gradient": (replaced(2, supervised_weight=1.0), "carries no gradient"),
    "unsupervised end": (replaced(5, supervised_weight=0.0), "last pass"),
    "latent end": (replaced(5, target="latent", halt_weight=0.0), "last pass"),
    "a map of three": (replaced(1, combine="concat"), "combines 3 values by 'concat'"),
    "unknown combination": (replaced(2, combine="product"), "'product'"),
    "gradient with a gap": (replaced(4, grad=False), "'embedding' would receive no gradient"),
}


@pytest.mark.parametrize(("passes", "message"), REFUSED.values(), ids=REFUSED)
def test_contradictions_are_refused(passes: tuple[DecoderPass, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RecursionPlan("core", passes)


def test_an_embedding_without_gradient_is_refused_naming_group_and_flag() -> None:
    blind = tuple(
        dataclasses.replace(p, reads=("output", "latent")) if p.block == 1 else p for p in make_plan(**CUT).passes
    )
    with pytest.raises(UserError, match="'embedding'.*--num-latent-refinements"):
        RecursionPlan("core", blind)


def test_description_folds_equal_passes() -> None:
    lines = make_plan(2, 6, **CUT).describe().splitlines()
    assert len(lines) == 1 + 4
    assert lines[1].split()[:3] == ["1-6", "1", "latent"] and lines[4].split()[:3] == ["14", "2", "output"]
    assert "yes" in lines[4] and "yes" not in lines[1]


def test_the_plan_folder_imports_no_torch() -> None:
    code = "import sys, megatron_recursive.plan, megatron_recursive.accounting; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "megatron_recursive.plan.recursion_plan" in modules
    assert not {"torch", "megatron", "numpy"} & {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("weight", ["supervised_weight", "halt_weight"])
def test_a_loss_inside_a_block_is_refused(weight: str) -> None:
    passes = [dataclasses.replace(p, block=0) for p in make_plan().passes]
    passes[2] = dataclasses.replace(passes[2], **{"halt_weight": 0.0, weight: 1.0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Pass 2"):
        RecursionPlan("core", tuple(passes))


@pytest.mark.parametrize(
    "changes", [{"state_init": "learned"}, {"state_norm": "each"}, {"embedding_multiplier": -1.0}, {"state_std": 0.0}],
    ids=str,
)
def test_senseless_values_for_all_passes_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UserError):
        RecursionPlan.from_json(broken_json(**changes))


def family(name: str, **knobs: object) -> RecursionPlan:
    config = RecursionConfig(recursion_family=name, **knobs)  # type: ignore[arg-type]
    return build_plan(config.resolved(embedding_init_std=1.0))


RECURRENT: dict[str, object] = {"num_prelude_layers": 2, "num_coda_layers": 1, "num_recurrences": 3}


def test_a_recurrent_plan_reads_as_its_formula() -> None:
    plan = family("recurrent", **RECURRENT, injection="add", backprop_depth=2)
    assert [(p.stack, p.target, p.reads, p.grad) for p in plan.passes] == [
        ("prelude", "input", ("input",), True), ("core", "output", ("output", "input"), False),
        ("core", "output", ("output", "input"), True), ("core", "output", ("output", "input"), True),
        ("coda", "output", ("output",), True),
    ]  # fmt: skip
    assert RecursionPlan.from_json(plan.to_json()) == plan and plan.num_blocks == 1
    assert plan.layers_of(9) == {"prelude": range(2), "core": range(2, 8), "coda": range(8, 9)}
    assert plan.layers_by_pass([5, 4]) == [(2, 0), (3, 3), (3, 3), (3, 3), (0, 1)]
    assert plan.unrolled_layers(9) == 2 + 3 * 6 + 1
    assert "prelude" in plan.describe() and "step" not in plan.describe()
    bare = family("recurrent", **{**RECURRENT, "num_coda_layers": 0}, recurrence_step="mean")
    assert bare.passes[-1].stack == "coda" and "coda" not in bare.describe()  # it has no layers
    mean = family("recurrent", **RECURRENT, recurrence_step="mean")
    assert [p.step for p in mean.passes] == [1, 1 / 3, 1 / 3, 1 / 3, 1] and "0.333" in mean.describe()


def test_what_a_core_combines_where_it_starts_and_what_norms_it() -> None:
    knobs = {**RECURRENT, "injection": "concat", "state_init": "sampled", "state_std": 0.5}
    ends, every = (family("recurrent", **knobs, state_norm=norm) for norm in ("core-end", "core"))
    assert [p.combine for p in ends.passes] == ["sum", "concat", "concat", "concat", "sum"]
    assert [ends.closes(p) for p in ends.passes] == [False, False, False, True, False]
    assert [every.closes(p) for p in every.passes] == [False, True, True, True, False]
    assert all(make_plan().closes(p) for p in make_plan().passes) and not any(map(make_plan(state_norm="none").closes,
                                                                                  make_plan().passes))  # fmt: skip
    assert ends.state_init == "sampled" and ends.sources(ends.passes[1]) == ("output", "input")
    assert RecursionPlan.from_json(ends.to_json()) == ends and '"state_std": 0.5' in ends.to_json()
    assert "[output, input]" in ends.describe()
    assert "a output + B input" in family("recurrent", **RECURRENT, injection="diagonal").describe()
    once = family("recurrent", **{**knobs, "num_recurrences": 1}, state_norm="core-end")
    assert once.with_blocks(3) == ends


def test_how_a_state_moves_is_a_word_of_its_pass() -> None:
    gated = family("recurrent", **RECURRENT, recurrence_step="mean", boundary="gate")
    assert [p.moved_with for p in gated.passes] == [(), *[("output",)] * 3, ()] and gated.moves == ("gate",)
    assert RecursionPlan.from_json(gated.to_json()) == gated and "gate from 0.333" in gated.describe()
    for plan, step in ((gated, 1 / 3), (family("core", boundary="gate"), 0.99)):
        (bias,) = (each.start for each in added_parameters(plan) if each.key == "boundary_gate.bias")
        assert math.exp(-math.log1p(math.exp(float(bias)))) == pytest.approx(step, abs=1e-4)
    assert [p.move for p in family("core", num_latent_refinements=2, boundary="gate").passes[:3]] == [
        "gate", "gate", "step"]  # fmt: skip
    bare = family("recurrent", num_recurrences=4, backprop_depth=2, boundary="norm-inject")
    assert bare.passes[-1].stack == "coda" and "norm + input" in bare.describe()
    # The third pass is the first with gradient; the state that the fourth reads is made of its result and the input.
    assert bare.first_input_gradient() is bare.passes[3] and bare.gradient_groups(tied_embeddings=False)["embedding"]
    assert all(map(bare.feeds_gradient, bare.grad_passes[:-1])) and not family("recurrent").moves
    for wrong, match in (({"move": "slide"}, "moves the output by 'slide'"), ({"reads": ("input",)}, "must read it")):
        number = 3 if "move" in wrong else 4
        passes = [dataclasses.replace(p, **wrong) if p.index == number else p for p in gated.passes]  # type: ignore[arg-type]
        with pytest.raises(UserError, match=match):
            dataclasses.replace(gated, passes=tuple(passes))


def test_a_sampled_start_is_a_truncated_normal_of_each_token_and_of_none_behind_it() -> None:
    torch = pytest.importorskip("torch")
    found = sampled_start(torch.arange(512)[None], 64, 0.5, draw=7)
    assert abs(float(found.mean())) < 0.01 and float(found.std()) == pytest.approx(0.5 * 0.9867, abs=0.01)
    assert 1.4 < float(found.abs().max()) <= 1.5 and len(found.unique()) > 0.99 * found.numel()
    rows, columns = torch.corrcoef(found[0]), torch.corrcoef(found[0].T)
    assert (rows - torch.eye(512)).abs().max() < 0.75 and (columns - torch.eye(64)).abs().max() < 0.25
    assert torch.equal(found[:, 100:], sampled_start(torch.arange(100, 512)[None], 64, 0.5, draw=7))
    assert not torch.equal(found, sampled_start(torch.arange(512)[None], 64, 0.5, draw=8))
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    told, moved = tokens_so_far(ids), ids.clone()
    moved[:, 5] += 1
    assert torch.equal(tokens_so_far(moved)[:, :5], told[:, :5]) and (tokens_so_far(moved) != told)[:, 5:].all()
    assert len(told.unique()) == told.numel() and int(told.max()) < 2**32


def test_two_stacks_share_the_layers() -> None:
    plan = family("hierarchical", num_refinement_blocks=2, num_latent_refinements=2)
    assert [p.stack for p in plan.passes] == ["low", "low", "high"] * 2
    assert plan.layers_of(6) == {"low": range(3), "high": range(3, 6)}
    with pytest.raises(UserError, match="--num-layers 5"):
        plan.layers_of(5)
    with pytest.raises(UserError, match="--num-layers 3 must hold 2 of the prelude, 1 of the coda"):
        family("recurrent", **RECURRENT).layers_of(3)


def test_each_block_of_a_hierarchy_has_its_window() -> None:
    """HRM-Text's [2] over two blocks of three: padded with 1 before, five of eight passes with gradient."""
    knobs = {"num_refinement_blocks": 2, "num_latent_refinements": 3, "latent_backprop_depth": "2"}
    plan = family("hierarchical", **knobs, state_init="trunc-normal")
    assert [p.grad for p in plan.passes] == [False, False, True, True, False, True, True, True]
    assert plan.grad_passes[0].index == 2 and plan.first_input_gradient() is plan.passes[2] and plan.num_blocks == 2
    assert not plan.feeds_gradient(plan.passes[1]) and all(map(plan.feeds_gradient, plan.grad_passes[:-1]))
    assert plan.starts_at_input and plan.initial_vectors == ("latent",)
    assert plan == family("hierarchical", **{**knobs, "latent_backprop_depth": "1,2"}, state_init="trunc-normal")
    assert RecursionPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("prelude", [0, 2])
def test_a_window_that_starves_embedding_and_prelude_is_refused(prelude: int) -> None:
    with pytest.raises(UserError, match="embedding.*give --injection add, or no --backprop-depth"):
        family("recurrent", num_recurrences=4, backprop_depth=2, num_prelude_layers=prelude)
    family("recurrent", num_recurrences=4, backprop_depth=2, num_prelude_layers=prelude, injection="add")


@pytest.mark.parametrize("knobs", [{}, {"recurrence_step": "mean"}, {"recurrence_step": "0.25"}, RECURRENT,
                                   {**RECURRENT, "recurrence_step": "mean"}])  # fmt: skip
def test_another_depth_of_a_core_is_that_of_the_knobs(knobs: dict[str, object]) -> None:
    plans = {depth: family("recurrent", **{**knobs, "num_recurrences": depth}) for depth in (1, 2, 4, 8)}
    for start in plans.values():
        assert all(start.with_blocks(depth) == plan for depth, plan in plans.items())


def test_beyond_the_plan_its_last_block_is_repeated() -> None:
    plan = make_plan(**CUT)
    assert plan.passes_per_block == 3
    assert [plan.known(index).index for index in range(12)] == [*range(6), *(3, 4, 5) * 2]


def test_a_gated_plan_supervises_every_loop_at_any_depth() -> None:
    knobs = {"recursion_family": "looped", "exit_gate": True, "embedding_multiplier": 1.0}
    plan = build_plan(RecursionConfig(**knobs, num_refinement_blocks=3))  # type: ignore[arg-type]
    assert [p.supervised_weight for p in plan.passes] == [1.0] * 3 and plan.exit_gate and not plan.has_halting
    assert plan.with_blocks(1).with_blocks(5).passes == build_plan(
        RecursionConfig(**knobs, num_refinement_blocks=5)  # type: ignore[arg-type]
    ).passes
    assert RecursionPlan.from_json(plan.to_json()) == plan
    assert plan.gradient_groups(tied_embeddings=False)["exit gate"]
    assert "1 p" in plan.describe() and "by the exit gate" in plan.describe()
    with pytest.raises(UserError, match="every block supervised"):
        dataclasses.replace(plan, passes=(dataclasses.replace(plan.passes[0], supervised_weight=0.0), *plan.passes[1:]))
