"""One function per family of recursion: from the knobs to the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_recursive.errors import UserError
from megatron_recursive.plan.deep_supervision import supervised
from megatron_recursive.plan.recursion_config import RecursionConfig
from megatron_recursive.plan.recursion_plan import MAPS, DecoderPass, RecursionPlan


def build_plan(config: RecursionConfig) -> RecursionPlan:
    """The plan of a resolved config (``embedding_multiplier`` must not be None)."""
    assert config.embedding_multiplier is not None, "resolve the config first"
    plan = RecursionPlan.plain(config.embedding_multiplier)
    if config.enable_recursive_refinement:
        plan = supervised(FAMILIES[config.recursion_family](config), config)
    if config.num_supervision_steps > 1 and not plan.carried:
        mend = " (it needs --state-init sampled, and steps that are no mean)" if plan.family == "recurrent" else ""
        raise UserError(
            f"--num-supervision-steps {config.num_supervision_steps} carries states from step to step, of which the "
            f"plan of this {plan.family} model has none{mend}; leave it out, or use --recursion-family core."
        )
    return plan


def core_plan(config: RecursionConfig) -> RecursionPlan:
    """T blocks of n latent passes and one output pass, V = T (n + 1) passes in all (Jolicoeur-Martineau 2025, TRM)::

        repeat T times:
            n times:  latent = decoder(output + latent + input)
            once:     output = decoder(output + latent)
    """
    blocks, latents = config.num_refinement_blocks, config.num_latent_refinements
    passes: list[DecoderPass] = []
    for block in range(blocks):
        last_block = block == blocks - 1
        grad = last_block or not config.detach_between_refinements or config.enable_deep_supervision
        for step in range(latents + 1):
            is_output = step == latents
            passes.append(DecoderPass(
                index=len(passes),
                block=block,
                target="output" if is_output else "latent",
                reads=("output", "latent") if is_output else ("output", "latent", "input"),
                grad=grad,
                cuts_states=config.detach_between_refinements and step == 0 and block > 0,
                supervised_weight=1.0 if is_output and last_block else 0.0,
                halt_weight=_halt_weight(config, block) if is_output else 0.0,
                move="step" if is_output else config.move,
            ))
    multiplier = config.embedding_multiplier or 1.0
    return RecursionPlan("core", tuple(passes), config.state_init, config.state_norm, multiplier)


def recurrent_plan(config: RecursionConfig) -> RecursionPlan:
    """A prelude, r passes of a core that end in one state, and a coda (Geiping et al. 2025, Huginn)::

        input = prelude(input);  output = input, or a normal
        repeat r times:  output += step * (core(output [with input]) - output)
        output = coda(output)

    A step of 1 / r turns r passes of pretrained layers into sub-steps of the one that they were trained for
    (arXiv 2605.23872).
    """
    r, window = config.num_recurrences, config.backprop_depth or config.num_recurrences
    reads = ("output",) if config.injection == "none" else ("output", "input")
    combine = config.injection if config.injection in MAPS else "sum"
    passes: list[DecoderPass] = []
    if config.num_prelude_layers:
        passes.append(DecoderPass(0, 0, "input", ("input",), grad=True, stack="prelude"))
    for step in range(r):
        passes.append(DecoderPass(len(passes), 0, "output", reads, grad=step >= r - window, step=config.step_size,
                                  combine=combine, move=config.move))  # fmt: skip
    # A state that was moved by a part is read by a pass; at r = 1 too, where a step of 1 / r is 1.
    if config.num_coda_layers or config.recurrence_step != "1" or not passes[-1].replaces_state:
        passes.append(DecoderPass(len(passes), 0, "output", ("output",), grad=True, stack="coda"))
    passes[-1] = replace(passes[-1], supervised_weight=1.0)
    stacks = (("prelude", config.num_prelude_layers), ("core", None), ("coda", config.num_coda_layers))
    multiplier = config.embedding_multiplier or 1.0
    start, std = ("sampled", config.state_std) if config.state_init == "sampled" else ("input", 1.0)
    norm = config.state_norm.replace("final", "none")
    is_mean = config.recurrence_step == "mean"
    return RecursionPlan("recurrent", tuple(passes), start, norm, multiplier, stacks, is_mean, std)


def looped_plan(config: RecursionConfig) -> RecursionPlan:
    """The whole stack T times, nothing injected (Zhu et al. 2025, Ouro)::

        output = input
        repeat T times:  output = core(output)

    With an exit gate every loop is supervised, by its probability p of leaving there.
    """
    loops, gated = config.num_refinement_blocks, config.exit_gate
    passes = tuple(
        DecoderPass(loop, loop, "output", ("output",), grad=True, supervised_weight=float(gated or loop == loops - 1),
                    halt_weight=_halt_weight(config, loop))
        for loop in range(loops)
    )  # fmt: skip
    multiplier = config.embedding_multiplier or 1.0
    return RecursionPlan("looped", passes, "input", config.state_norm, multiplier, exit_gate=gated)


def hierarchical_plan(config: RecursionConfig) -> RecursionPlan:
    """Two stacks at two speeds, half of the layers each (Wang et al. 2025, HRM; HRM-Text starts as here)::

        output = input
        repeat T times:
            n times:  latent = low(latent + output)
            once:     output = high(output + latent)

    In each block the last so many latent passes of ``latent_windows`` carry gradient, and the output pass does.
    """
    core = replace(config, recursion_family="core", detach_between_refinements=False, latent_backprop_depth="0")
    plan, windows, latents = core_plan(core), config.latent_windows, config.num_latent_refinements
    passes = []
    for p in plan.passes:
        if p.target == "latent":
            behind = latents - p.index % (latents + 1)  # latent passes from here to the end of the block
            passes.append(replace(p, reads=("latent", "output"), stack="low", grad=behind <= windows[p.block]))
        else:
            passes.append(replace(p, stack="high"))
    starts = "input" if config.state_init == "zeros" else f"input, {config.state_init}"
    stacks = (("low", None), ("high", None))
    return replace(plan, family="hierarchical", passes=tuple(passes), state_init=starts, stacks=stacks)


def _halt_weight(config: RecursionConfig, block: int) -> float:
    blocks, last = config.num_refinement_blocks, float(block == config.num_refinement_blocks - 1)
    return (1.0 / blocks if config.halt_supervision == "all" else last) if config.has_halting else 0.0


FAMILIES: dict[str, Callable[[RecursionConfig], RecursionPlan]] = {
    "core": core_plan, "recurrent": recurrent_plan, "looped": looped_plan, "hierarchical": hierarchical_plan,
}  # fmt: skip
