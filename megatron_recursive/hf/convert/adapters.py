"""Low-rank adapters of a checkpoint on their way out: merged into the weights, as a PEFT folder, or pass by pass.

B has the rows of Megatron's fused matrix, and is split as the weight is; A goes to each of the parts. So q, k and v (or
gate and up) of an export have an adapter each, with equal A, and compute what the fused one does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.architecture import Architecture
from megatron_recursive.hf.convert.files import new_folder
from megatron_recursive.hf.convert.mappings import Item
from megatron_recursive.hf.convert.torch_dist import LAYERS
from megatron_recursive.hf.convert.transforms import same
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plan.lora import SHARED, LoRA

PASS = {"A": "pass_A", "B": "pass_B"}  # of our own model, before the pass
PEFT = {"A": "lora_A.weight", "B": "lora_B.weight"}


def choose_mode(asked: str | None, lora: LoRA | None, where: str) -> str | None:
    """How adapters leave; None: there are none, or each pass has its own, which our own class alone computes."""
    if lora is None and asked is not None:
        raise UserError(f"--lora {asked} needs adapters (--lora-rank), of which {where} holds none; leave it out.")
    if lora is None or (lora.per_pass and asked in (None, "base")):
        return asked
    if lora.per_pass:
        why = "one weight cannot hold" if asked == "merged" else "PEFT does not know"
        raise UserError(f"--lora {asked} does not go with adapters of each pass (--lora-per-pass), which {why}; leave "
                        "it out for a model of our own class, which has them inside.")  # fmt: skip
    return asked or "merged"


def adapter_items(
    weights: Iterable[Item], lora: LoRA, plan: RecursionPlan, arch: Architecture, names: dict[str, str] = PASS
) -> Iterator[Item]:
    """A and B beside each weight that has them. Of our own class, the pass follows ``names``; PEFT has none."""
    for item in weights:
        for name, keys in keys_beside(item, lora, plan, arch).items():
            end = "" if name == SHARED else f"_{name}"
            down: dict[str, tuple[int, ...]] = {}
            up: dict[str, tuple[int, ...]] = {}
            for weight, (rows, columns) in item.hf.items():
                place = weight.removesuffix("weight")
                down[f"{place}{names['A']}{end}"] = lora.rank, columns
                up[f"{place}{names['B']}{end}"] = rows, lora.rank
            yield Item(keys[0], None, same(len(down)), down)
            yield Item(keys[1], None, item.transform, up)


def keys_beside(item: Item, lora: LoRA, plan: RecursionPlan, arch: Architecture) -> dict[str, tuple[str, str]]:
    """The keys of A and B beside a weight, by name."""
    if item.layer is None:
        return {}
    return lora.keys(plan, arch.num_layers, item.layer, item.key.removeprefix(LAYERS))


def write_peft(
    weights: list[Item], lora: LoRA, plan: RecursionPlan, arch: Architecture, read: Callable[[str], Tensor],
    target: Path,
) -> int:  # fmt: skip
    """A folder for ``PeftModel.from_pretrained`` over the exported base (or its donor). Returns how many tensors."""
    tensors: dict[str, Tensor] = {}
    for item in adapter_items(weights, lora, plan, arch, PEFT):
        for name, part in zip(item.hf, item.transform.split(read(item.key), arch), strict=True):
            tensors[f"base_model.model.{name}"] = part.clone()
    modules = {".".join(name.split(".")[-4:-2]) for name in tensors}  # such as self_attn.q_proj
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted(modules), "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip
    with new_folder(target, sum(each.nbytes for each in tensors.values())) as folder:
        (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(tensors)
