"""Low-rank adapters beside the frozen matrices of layers, declared once: ``W x`` becomes ``W x + alpha / rank B A x``.

Layers share one adapter over all passes, or have one for each (relaxed recursion, arXiv 2410.20672). A pass that
carries no gradient would leave its own at zero, and has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_recursive.plan.recursion_plan import RecursionPlan

TARGETS = {  # by the flag's word, which is Megatron's: the module in a layer
    "linear_qkv": "self_attention.linear_qkv", "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1", "linear_fc2": "mlp.linear_fc2",
}  # fmt: skip
MODES = ("merged", "peft", "base")  # in which adapters leave a checkpoint
SHARED = "shared"
MODULE = "lora"  # of a layer


@dataclass(frozen=True)
class LoRA:
    """What a run's flags ask for. Matrices that Megatron fuses (q, k, v; gate, up) share A; B has a row for each.

    Attributes:
        alpha: what A B x is multiplied with, times the rank.
        seed: of A; B starts at zero.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    per_pass: bool = False
    seed: int = 0

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> LoRA | None:
        """Of a run's or a checkpoint's arguments; None where they ask for no adapters."""
        if args.get("lora_rank") is None:
            return None
        rank, targets = args["lora_rank"], args.get("lora_targets") or TARGETS
        alpha = 2.0 * rank if args.get("lora_alpha") is None else float(args["lora_alpha"])
        ordered = tuple(each for each in TARGETS if each in targets)
        return cls(rank, alpha, ordered, bool(args.get("lora_per_pass")), args.get("seed") or 0)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def names(self, plan: RecursionPlan, num_layers: int, layer: int) -> tuple[str, ...]:
        """Of the adapters that each matrix of a layer has: by the index of the pass, or the shared one."""
        stacks = plan.layers_of(num_layers)
        own = (str(each.index) for each in plan.passes if each.grad and layer in stacks[each.stack])
        return tuple(own) if self.per_pass else (SHARED,)

    def keys(self, plan: RecursionPlan, num_layers: int, layer: int, weight: str) -> dict[str, tuple[str, str]]:
        """By name, the keys of A and B beside a weight of a layer, such as ``mlp.linear_fc2.weight``."""
        (target,) = [name for name, path in TARGETS.items() if f"{path}.weight" == weight] or [""]
        if target not in self.targets:
            return {}
        place = f"decoder.layers.{layer}.{MODULE}.{target}"
        return {name: (f"{place}.A_{name}", f"{place}.B_{name}") for name in self.names(plan, num_layers, layer)}
