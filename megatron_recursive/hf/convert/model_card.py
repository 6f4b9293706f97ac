"""The model card of an export: where the weights come from, what they compute, how well, and how to load them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from megatron_recursive.errors import UserError
from megatron_recursive.figures import blocks_of
from megatron_recursive.hf.convert.report import REPORT_FILE
from megatron_recursive.plan import RecursionPlan
from megatron_recursive.plots.runs import FILE, read_runs

CARD = "README.md"
LICENSE = ("license", "license_name", "license_link")


def donor_facts(given: Path) -> dict[str, Any]:
    """What a checkpoint remembers of its donor, a folder or file: its name, never its path, and what its card says."""
    folder = given if given.is_dir() else given.parent
    cached = [part.removeprefix("models--").replace("--", "/") for part in folder.parts if part.startswith("models--")]
    said = _metadata(folder / CARD)
    base = cached[-1] if cached else said.get("base_model")
    facts = {"donor": base if cached else given.absolute().name, "base_model": base}
    facts.update({name: said[name] for name in LICENSE if isinstance(said.get(name), str)})
    return {name: value for name, value in facts.items() if value}


def _metadata(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # of YAML, of the hub's library or of the encoding: somebody else's card is no obstacle
        return {}


@dataclass(frozen=True)
class Exported:
    """What a card tells of a model.

    Attributes:
        architecture: its class. remote_code: it ships with the folder.
        checkpoint: folder of the iteration; ckpt: what was given to find it; args: what it stores.
        error: of the proof, None if it was skipped.
    """

    architecture: str
    remote_code: bool
    num_layers: int
    plan: RecursionPlan
    checkpoint: Path
    ckpt: Path
    args: Mapping[str, Any]
    error: float | None
    cast: bool = False  # the weights were given another dtype, and compared in it


def write_card(folder: Path, name: str, model: Exported) -> None:
    """Write README.md; ``name`` is the folder's, once it is complete."""
    run, iteration, plan = model.checkpoint.parent, model.checkpoint.name, model.plan
    facts = _conversion((model.ckpt, run, *_named(model.args)))
    if (model.ckpt / "config.json").is_file():
        facts = donor_facts(model.ckpt)
    licence: dict[str, Any] = {key: facts.get(key) for key in LICENSE}
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", base_model=facts.get("base_model"),
        tags=["recursive-gpt"] if model.remote_code else None, **licence,
    )  # fmt: skip
    applied = plan.unrolled_layers(model.num_layers)
    passes = "" if plan.is_plain else f", of which a token goes through {applied} in {plan.num_passes} passes"
    trust = ", trust_remote_code=True" if model.remote_code else ""
    proof = "was not compared with it" if model.error is None else (
        f"gives its logits{' as cast' * model.cast} (largest difference: {model.error:.1e} of the largest logit)")
    text = [
        f"# {name}",
        f"A language model of {model.num_layers} layers{passes}: {model.architecture}. It was converted from the "
        f"checkpoint `{iteration}` by megatron-recursive and {proof}.",
        f"* Donor of the weights: {facts.get('donor', 'none that the checkpoint names')}\n"
        f"* Licence: {facts.get('license', 'not known here; set `license` at the head of this file')}",
        "## Plan", f"```\n{plan.describe()}\n```", *_losses(run, iteration, facts), "## Loading",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```',
    ]  # fmt: skip
    if plan.has_halting:
        text.append('Tokens may leave early: `model.generate(..., exit="halting", halt_threshold=0.7)`.')
    if plan.exit_gate:
        text.append('Tokens may leave early: `model.generate(..., exit="quantile", exit_threshold=0.5)`.')
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n", encoding="utf-8")


def _named(args: Mapping[str, Any]) -> list[Path]:
    """Where a run took its weights and tokenizer from: the import is there."""
    tokenizer, load = args.get("tokenizer_model"), args.get("load")
    return [*([Path(load)] if load else []), *([Path(tokenizer).parent] if tokenizer else [])]


def _conversion(places: tuple[Path, ...]) -> dict[str, Any]:
    for place in places:
        try:
            return json.loads((place / REPORT_FILE).read_text(encoding="utf-8"))["summary"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def _losses(run: Path, iteration: str, facts: Mapping[str, Any]) -> list[str]:
    """The last evaluation of the run up to this iteration, block by block; of an import, the losses on its proof."""
    held_out: dict[str, Any] = {}
    if iteration.startswith("iter_") and (run / FILE).is_file():
        with contextlib.suppress(UserError):  # a file of another version is no obstacle
            evaluated = read_runs([run / FILE])[0].of("valid")
            trained = int(iteration.removeprefix("iter_"))
            held_out = next((each for each in evaluated[::-1] if each["iteration"] <= trained), {})
    blocks = {f"block {block}": loss for block, loss in blocks_of(held_out).items()}
    if "lm loss" in held_out:
        title, rows = f"## Loss by depth, held out, at iteration {held_out['iteration']}", blocks
        rows = rows or {"last block": held_out["lm loss"]}
    elif iteration == "release" and facts.get("loss"):
        title, rows = "## Loss on the text of the proof, before training", facts["loss"]
    else:
        return []
    return [title, "| | loss |\n|---|---|\n" + "\n".join(f"| {name} | {rows[name]:.4f} |" for name in rows)]
