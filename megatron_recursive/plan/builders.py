"""One function per family of recursion: from the knobs to the plan."""

from __future__ import annotations

from megatron_recursive.plan.recursion_config import RecursionConfig
from megatron_recursive.plan.recursion_plan import DecoderPass, RecursionPlan


def build_plan(config: RecursionConfig) -> RecursionPlan:
    """The plan of a resolved config (``embedding_multiplier`` must not be None)."""
    assert config.embedding_multiplier is not None, "resolve the config first"
    if config.enable_recursive_refinement:
        return core_plan(config)
    return RecursionPlan.plain(config.embedding_multiplier)


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
        grad = last_block or not config.detach_between_refinements
        for step in range(latents + 1):
            is_output = step == latents
            halt_weight = 0.0
            if is_output and config.has_halting:
                halt_weight = 1.0 / blocks if config.halt_supervision == "all" else float(last_block)
            passes.append(DecoderPass(
                index=len(passes),
                block=block,
                target="output" if is_output else "latent",
                reads=("output", "latent") if is_output else ("output", "latent", "input"),
                grad=grad,
                cuts_states=config.detach_between_refinements and step == 0 and block > 0,
                supervised_weight=1.0 if is_output and last_block else 0.0,
                halt_weight=halt_weight,
            ))
    multiplier = config.embedding_multiplier or 1.0
    return RecursionPlan("core", tuple(passes), config.state_init, config.state_norm, multiplier)
