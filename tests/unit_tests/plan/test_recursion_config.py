"""Every knob: its default, its rule, its flag, and what becomes of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import Any

import pytest

from megatron_recursive.errors import UserError
from megatron_recursive.plan import RecursionConfig, build_plan
from megatron_recursive.plan.knobs import PARTS, HeadKnobs, flag_of, knobs_in
from megatron_recursive.plan.recursion_config import add_recursion_arguments
from megatron_recursive.plan.recursion_plan import STATES
from megatron_recursive.plan.supervision_steps import whole

KNOBS = {knob.name: knob for knob in dataclasses.fields(RecursionConfig)}
SWITCHES = {
    "enable_recursive_refinement": "--disable-recursive-refinement",
    "detach_between_refinements": "--no-detach-between-refinements",
    "exit_gate": "--no-exit-gate",
    "carry_halted": "--no-carry-halted",
    "uncalibrated_recurrence": "--calibrated-recurrence",
    "enable_deep_supervision": "--disable-deep-supervision",
}
# A value other than the default, and values that are refused.
OTHER: dict[str, tuple[Any, list[Any]]] = {
    "enable_recursive_refinement": (False, []),
    "recursion_family": ("looped", ["hrm"]),
    "num_refinement_blocks": (5, [0, -1]),
    "num_latent_refinements": (2, [0, -3]),
    "num_recurrences": (8, [0]),
    "num_prelude_layers": (2, [-1]),
    "num_coda_layers": (2, [-1]),
    "injection": ("add", ["product"]),
    "recurrence_step": ("mean", ["0", "1.5", "half", "nan"]),
    "boundary": ("gate", ["norm"]),
    "state_init": ("trunc-normal", ["learned", ""]),
    "state_std": (0.5, [0.0, math.nan]),
    "state_norm": ("none", ["each"]),
    "embedding_multiplier": (2.5, [0.0, -1.0, math.nan, math.inf]),
    "exit_gate": (True, []),
    "halt_loss_weight": (0.25, [-0.1, math.nan, math.inf]),
    "halt_bias": (-2.0, [math.nan, -math.inf]),
    "detach_between_refinements": (True, []),
    "enable_deep_supervision": (True, []),
    "deep_supervision_weight": (0.25, [0.0, -0.5, math.nan, math.inf]),
    "deep_supervision_schedule": ("linear_decay", ["cosine"]),
    "deep_supervision_warmup": ((10, 20), [(20, 10), (5, 5), (-1, 5), (1,), (1.0, 2.0), "10"]),
    "backprop_depth": (2, [-1]),
    "recurrence_distribution": ("poisson-lognormal", ["poisson", "lognormal"]),
    "mean_recurrence": (6.5, [0.5, math.nan, math.inf]),
    "max_recurrence": (9, [0]),
    "uncalibrated_recurrence": (True, []),
    "recurrence_curriculum": ("1-sqrt", ["cosine"]),
    "recurrence_curriculum_fraction": (0.75, [0.0, 1.01, math.nan]),
    "backprop_curriculum": ("linear", ["cosine"]),
    "backprop_curriculum_fraction": (1.0, [-0.25, 2.0]),
    "grow_depth_at": ("0.77:8", ["0.77", "1.5:8", "0.5:3"]),
    "grow_rewarm_iters": (40, [-1]),
    "latent_backprop_depth": ("1,2", ["", "-1", "1,0", "two", "1,1,1,1"]),
    "init_depth_scaling": ("unrolled", ["both"]),
    "halt_supervision": ("last", ["first"]),
    "halt_target": ("agrees-with-last", ["wrong"]),
    "exit_entropy_weight": (0.5, [-0.1, math.nan, math.inf]),
    "num_supervision_steps": (4, [0, -1]),
    "carry_halted": (True, []),
    "halt_exploration": (0.5, [-0.1, 1.5, math.nan]),
    "halt_threshold": (0.9, [0.0, 1.0, -1.0, 2.0, math.nan]),
    "max_inference_refinement_steps": (4, [0]),
    "recursion_alarm_after": (0, [-1]),
    "eval_depths": ("1,4,16", ["", "0", "1,0", "1 4", "1,"]),
}
RECURRENT = {"num_recurrences", "num_prelude_layers", "num_coda_layers", "injection", "recurrence_step",
             "boundary", "state_std"}  # fmt: skip
BACKPROP = {"backprop_depth", "backprop_curriculum", "backprop_curriculum_fraction"}
DRAWN = {"mean_recurrence", "max_recurrence", "uncalibrated_recurrence"}
GATED = {"exit_gate", "exit_entropy_weight"}
BAD = [(name, value) for name, (_, values) in OTHER.items() for value in values]


def beside(name: str) -> dict[str, Any]:
    """What must be said for a knob to mean something."""
    if name in GATED:
        return {"recursion_family": "looped", "exit_gate": True}
    if name in ("carry_halted", "halt_exploration"):
        return {"num_supervision_steps": 2, "carry_halted": True}
    if name.startswith("deep_supervision"):
        return {"enable_deep_supervision": True}
    if name == "latent_backprop_depth":
        return {"recursion_family": "hierarchical"}
    if name == "state_std":
        return {"recursion_family": "recurrent", "state_init": "sampled", "injection": "add"}
    if name in DRAWN:
        return {"recurrence_distribution": "poisson-lognormal"}
    if name.startswith("backprop_curriculum"):
        return {"recursion_family": "recurrent", "backprop_depth": 2, "backprop_curriculum": "linear"}
    if name == "grow_rewarm_iters":
        return {"grow_depth_at": "0.77:8"}
    if name == "recurrence_curriculum_fraction":
        return {"recurrence_curriculum": "linear"}
    return {"recursion_family": "recurrent"} if name in RECURRENT | BACKPROP else {}


def parse(*flags: str) -> RecursionConfig:
    parser = add_recursion_arguments(argparse.ArgumentParser())
    return RecursionConfig.from_mapping(vars(parser.parse_args(flags)))


def test_the_table_above_knows_every_knob() -> None:
    assert list(OTHER) == list(KNOBS)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_senseless_value_is_refused_naming_the_flag(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=flag_of(name)):
        RecursionConfig(**{**beside(name), name: value})


@pytest.mark.parametrize(
    ("name", "value", "family"),
    [("num_recurrences", 8, "core"), ("num_latent_refinements", 2, "looped"), ("injection", "add", "hierarchical"),
     ("detach_between_refinements", True, "recurrent"),
     ("state_norm", "core", "looped"), ("state_init", "sampled", "core"), ("state_init", "trunc-normal", "recurrent"),
     ("exit_entropy_weight", 0.2, "core"), ("exit_gate", True, "hierarchical"), ("halt_bias", -1.0, "recurrent"),
     ("halt_loss_weight", 0.5, "recurrent"), ("num_supervision_steps", 2, "looped"),
     ("num_supervision_steps", 4, "hierarchical"), ("carry_halted", True, "recurrent"),
     ("enable_deep_supervision", True, "recurrent"),
     ("boundary", "gate", "looped"), ("boundary", "norm-inject", "core")],
)  # fmt: skip
def test_a_knob_of_another_family_is_refused_by_name(name: str, value: Any, family: str) -> None:
    flag = f"{flag_of(name)} {value}"
    if isinstance(value, bool):
        flag = flag_of(name) if value else SWITCHES[name]
    with pytest.raises(UserError, match=f"{flag} belongs to --recursion-family .*is {family}"):
        RecursionConfig(recursion_family=family, **{name: value})
    assert not RecursionConfig(recursion_family="recurrent", halt_loss_weight=0.0).has_halting


def test_depths_are_evaluated_in_order_and_need_a_recursion() -> None:
    assert RecursionConfig(eval_depths="4,1,4").depths_to_evaluate == (1, 4)
    with pytest.raises(UserError, match="--eval-depths needs a recursion; leave .*--disable-recursive-refinement"):
        RecursionConfig(enable_recursive_refinement=False, eval_depths="1")


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_has_a_flag_and_a_text(name: str) -> None:
    value = OTHER[name][0]
    assert KNOBS[name].metadata["help"].endswith(".")
    words = {**beside(name), name: value}
    flags = [[flag_of(knob) if said else SWITCHES[knob]] if knob in SWITCHES
             else [flag_of(knob), *map(str, said if isinstance(said, tuple) else [said])]
             for knob, said in words.items()]  # fmt: skip
    assert parse(*(word for flag in flags for word in flag)) == RecursionConfig(**words)


@pytest.mark.parametrize(("name", "off"), SWITCHES.items())
def test_switches_have_both_flags_and_the_last_one_counts(name: str, off: str) -> None:
    needs = {"exit_gate": ["--recursion-family", "looped"], "carry_halted": ["--num-supervision-steps", "2"],
             "uncalibrated_recurrence": ["--recurrence-distribution", "poisson-lognormal"]}  # fmt: skip
    beside = needs.get(name, [])
    assert getattr(parse(), name) is KNOBS[name].default
    assert getattr(parse(*beside, flag_of(name)), name) is True
    assert getattr(parse(*beside, off), name) is False
    assert getattr(parse(*beside, off, flag_of(name)), name) is True
    assert getattr(parse(*beside, flag_of(name), off), name) is False


def test_a_knob_of_two_names_takes_one_value() -> None:
    assert parse("--H-cycles", "2", "--L-cycles=4", "--num-latent-refinements", "4") == RecursionConfig(
        num_refinement_blocks=2, num_latent_refinements=4)  # fmt: skip
    assert parse("--H-cycles", "2", "--H-cycles", "3").num_refinement_blocks == 3
    with pytest.raises(UserError, match="--num-refinement-blocks 2 and --H-cycles 3 are two names of one knob"):
        parse("--num-refinement-blocks=2", "--H-cycles=3")


def test_a_sampled_start_asks_for_an_injection() -> None:
    with pytest.raises(UserError, match="--injection .*give it add or concat"):
        RecursionConfig(recursion_family="recurrent", state_init="sampled")


@pytest.mark.parametrize(("name", "value"), [("injection", "add"), ("recurrence_step", "mean")])
def test_what_a_boundary_that_injects_takes_the_place_of_is_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{flag_of(name)} does not go with --boundary norm-inject.*is {value}"):
        RecursionConfig(recursion_family="recurrent", boundary="norm-inject", **{name: value})


def test_without_flags_the_defaults_hold() -> None:
    assert parse() == RecursionConfig()


@pytest.mark.parametrize(("name", "value"), [("state_init", "learned"), ("num_refinement_blocks", "two")])
def test_argparse_refuses(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(flag_of(name), value)
    assert flag_of(name) in capsys.readouterr().err


def test_help_prints() -> None:
    text = add_recursion_arguments(argparse.ArgumentParser()).format_help()
    assert all(flag in text for name in KNOBS for flag in (flag_of(name), SWITCHES.get(name, "")))


@pytest.mark.parametrize(
    ("knobs", "from_plain_gpt", "multiplier", "scaling"),
    [
        ({}, False, 50.0, "held"),
        ({}, True, 1.0, "held"),
        ({"enable_recursive_refinement": False}, False, 1.0, "held"),
        ({"enable_recursive_refinement": False, "state_norm": "none"}, False, 1.0, "held"),
        ({"state_norm": "none"}, False, 50.0, "unrolled"),
        ({"state_norm": "none"}, True, 1.0, "unrolled"),
        ({"recursion_family": "recurrent"}, True, 1.0, "unrolled"),
        ({"embedding_multiplier": 3.0, "init_depth_scaling": "unrolled"}, False, 3.0, "unrolled"),
        ({"embedding_multiplier": 3.0, "init_depth_scaling": "held", "state_norm": "none"}, True, 3.0, "held"),
    ],
)
def test_resolved(knobs: dict[str, Any], from_plain_gpt: bool, multiplier: float, scaling: str) -> None:
    config = RecursionConfig(**knobs)
    resolved = config.resolved(embedding_init_std=0.02, from_plain_gpt=from_plain_gpt)
    assert (resolved.embedding_multiplier, resolved.init_depth_scaling) == (multiplier, scaling)
    assert resolved.resolved(embedding_init_std=1.0) == resolved
    given = {"embedding_multiplier": config.embedding_multiplier, "init_depth_scaling": config.init_depth_scaling}
    assert dataclasses.replace(resolved, **given) == config


def test_frozen_hashable_and_made_of_primitives() -> None:
    config = RecursionConfig()
    assert hash(config) == hash(RecursionConfig()) and {config: 1}[RecursionConfig()] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.halt_bias = 0.0  # type: ignore[misc]
    assert all(value is None or type(value) in (bool, int, float, str) for value in config.to_dict().values())


def test_from_mapping_inverts_to_dict_and_ignores_the_rest() -> None:
    others = RECURRENT | BACKPROP | GATED | {"recursion_family", "latent_backprop_depth"}
    others |= {"grow_depth_at", "grow_rewarm_iters", "eval_depths"}  # not of a plain GPT
    config = RecursionConfig(**{name: value for name, (value, _) in OTHER.items() if name not in others})
    kept = dataclasses.replace(config, recursion_alarm_after=None)  # what only observes is not kept with weights
    assert RecursionConfig.from_mapping({**config.to_dict(), "hidden_size": 4}) == kept != config
    assert RecursionConfig.from_mapping(vars(config)) == config
    assert RecursionConfig.from_mapping({}) == RecursionConfig()


@pytest.mark.parametrize("name", list(RecursionConfig().to_dict())[1:])
def test_one_difference(name: str) -> None:
    others = {knob: value for knob, value in beside(name).items() if knob != name}
    mine, theirs = RecursionConfig(**others), RecursionConfig(**{name: OTHER[name][0]}, **others)
    (found,) = mine.differences(theirs)
    assert (found.name, found.mine, found.theirs) == (name, getattr(mine, name), OTHER[name][0])
    assert found.is_depth == (name in ("num_refinement_blocks", "num_latent_refinements", "num_recurrences"))
    shapes_the_function = ("num_refinement_blocks", "num_latent_refinements", "state_init", "state_norm")
    families = ("recursion_family", *RECURRENT)
    assert found.binds == (name in (*shapes_the_function, *families, "embedding_multiplier", "exit_gate"))
    assert mine.differences(mine) == [] == mine.differences(RecursionConfig(recursion_alarm_after=3, **others))


def test_the_parts_hold_every_knob_once_and_a_command_takes_the_parts_it_reads() -> None:
    assert [knob.name for part in PARTS for knob in dataclasses.fields(part)] == list(KNOBS)
    parser = add_recursion_arguments(argparse.ArgumentParser(), [HeadKnobs], only_given=True)
    assert "(default:" not in parser.format_help() and "the source's own" in parser.format_help()
    assert vars(parser.parse_args([])) == {}
    assert knobs_in(vars(parser.parse_args(["--halt-bias", "-1"]))) == {"halt_bias": -1.0}
    with pytest.raises(SystemExit):
        parser.parse_args(["--num-refinement-blocks", "2"])


def test_knobs_of_a_head_that_is_not_there_are_refused() -> None:
    looped: dict[str, Any] = {"recursion_family": "looped"}
    with pytest.raises(UserError, match="--halt-bias says nothing with --exit-gate"):
        RecursionConfig(**looped, exit_gate=True, halt_bias=-1.0)
    with pytest.raises(UserError, match="--exit-entropy-weight says nothing without --exit-gate"):
        RecursionConfig(**looped, exit_entropy_weight=0.05)
    with pytest.raises(UserError, match="--exit-gate chooses between loops"):
        RecursionConfig(**looped, exit_gate=True, num_refinement_blocks=1)
    assert not RecursionConfig(**looped, exit_gate=True).has_halting


def test_deep_supervision_needs_blocks_to_supervise_and_nothing_else_that_weighs_them() -> None:
    with pytest.raises(UserError, match="--enable-deep-supervision supervises .*--num-refinement-blocks 1 has none"):
        RecursionConfig(enable_deep_supervision=True, num_refinement_blocks=1)
    with pytest.raises(UserError, match="--exit-gate weighs .*leave --enable-deep-supervision out"):
        RecursionConfig(recursion_family="looped", exit_gate=True, enable_deep_supervision=True)
    with pytest.raises(UserError, match="--deep-supervision-warmup says nothing without --enable-deep-supervision"):
        RecursionConfig(deep_supervision_warmup=(0, 5))
    given = RecursionConfig(enable_deep_supervision=True, deep_supervision_warmup=(0, 5))
    assert RecursionConfig.from_mapping(json.loads(json.dumps(given.to_dict()))) == given == parse(*given.flags())


def test_once_recursion_is_off_only_that_counts() -> None:
    on, off = RecursionConfig(), RecursionConfig(enable_recursive_refinement=False, state_norm="none")
    for mine, theirs in ((on, off), (off, on)):
        (found,) = mine.differences(theirs)
        assert found.name == "enable_recursive_refinement" and found.binds
    assert off.differences(dataclasses.replace(off, state_norm="final", num_refinement_blocks=9)) == []


def test_carried_states_need_a_plan_that_has_some() -> None:
    recurrent: dict[str, Any] = {"recursion_family": "recurrent", "num_supervision_steps": 2}
    sampled = recurrent | {"state_init": "sampled", "injection": "concat"}
    for knobs in (recurrent, sampled | {"recurrence_step": "mean"}, {"enable_recursive_refinement": False,
                                                                     "num_supervision_steps": 2}):  # fmt: skip
        with pytest.raises(UserError, match="--num-supervision-steps 2 carries states .* has none"):
            build_plan(RecursionConfig(**knobs).resolved(embedding_init_std=1.0))
    plan = build_plan(RecursionConfig(**sampled, num_coda_layers=1).resolved(embedding_init_std=1.0))
    assert plan.carried == ("output",) and build_plan(RecursionConfig(embedding_multiplier=1.0)).carried == STATES
    with pytest.raises(UserError, match="--carry-halted .*give --num-supervision-steps 2 or more"):
        RecursionConfig(carry_halted=True)
    with pytest.raises(UserError, match="--carry-halted asks the halting head, which --halt-loss-weight 0 leaves out"):
        RecursionConfig(carry_halted=True, num_supervision_steps=2, halt_loss_weight=0.0)
    with pytest.raises(UserError, match="--halt-exploration 0.5 says nothing without --carry-halted"):
        RecursionConfig(num_supervision_steps=2, halt_exploration=0.5)


@pytest.mark.parametrize("knobs", [{}, {"recursion_family": "recurrent", "state_init": "sampled", "injection": "add"}])
def test_a_model_trained_in_steps_is_evaluated_as_all_of_them_in_a_row(knobs: dict[str, Any]) -> None:
    config = RecursionConfig(embedding_multiplier=2.0, num_supervision_steps=3, **knobs)
    all_steps, once = build_plan(whole(config)), build_plan(config)
    assert all_steps == once.with_blocks(3 * once.depth) and all_steps.depth == 3 * once.depth
    assert [(p.target, p.reads) for p in all_steps.passes] == [(p.target, p.reads) for p in once.passes] * 3
    assert whole(config).num_supervision_steps == 1


@pytest.mark.parametrize("family", ["recurrent", "looped", "hierarchical"])
def test_a_cut_that_other_families_have_stored_is_passed_over(family: str) -> None:
    """It was core's default, which every checkpoint and export of before holds."""
    config = RecursionConfig(recursion_family=family, halt_loss_weight=0.0)
    stored = {**config.to_dict(), "detach_between_refinements": True}
    assert RecursionConfig.from_stored(stored) == config
    assert RecursionConfig.from_stored({"detach_between_refinements": True}).detach_between_refinements
    with pytest.raises(UserError, match="--detach-between-refinements belongs to"):
        RecursionConfig.from_mapping(stored)
