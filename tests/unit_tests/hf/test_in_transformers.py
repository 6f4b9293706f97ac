"""The model under transformers' own machinery: the trainer, generation configs, assistants, order of outputs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from megatron_recursive.hf.model.exits_recursive_gpt import EXIT_ARGUMENTS
from megatron_recursive.hf.model.modeling_recursive_gpt import RecursiveGPTForCausalLM, RecursiveGPTOutput
from tests.unit_tests.hf.recursive_models import VOCAB, left_padded, make_model, make_tokens

EXIT = {"exit": "halting", "halt_threshold": 0.4, "exit_threshold": 0.2, "exit_stable_blocks": 3,
        "max_inference_refinement_steps": 2}  # fmt: skip


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [True, False])
def test_outputs_come_in_the_order_of_their_class(labels: bool) -> None:
    model, tokens = make_model(), make_tokens(2, 6)
    given = {"labels": tokens} if labels else {}
    named = model(tokens, output_blocks=True, output_hidden_states=True, **given)
    order = [field.name for field in dataclasses.fields(RecursiveGPTOutput)]
    assert list(named) == [name for name in order if name in named]
    assert named[0] is (named.loss if labels else named.logits)
    bare = model(tokens, return_dict=False, **given)
    assert isinstance(bare, tuple)
    torch.testing.assert_close(bare[: 1 + labels], (named.loss, named.logits)[1 - labels :])


# --- the trainer ----------------------------------------------------------------------------------------------------


def rows(count: int, length: int = 10) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in make_tokens(count, length)]


def training_arguments(folder: Path, **more: Any) -> TrainingArguments:
    given = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-3, "use_cpu": True, **more}
    return TrainingArguments(str(folder), report_to="none", disable_tqdm=True, logging_steps=1, seed=5, **given)


def test_the_trainer_evaluates_and_stops_early(tmp_path: Path) -> None:
    """Every extra output stays out of the predictions, and eval_loss is there to choose by."""
    seen: list[tuple[Any, Any]] = []

    def measure(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions, prediction.label_ids))
        return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    model = make_model()
    arguments = training_arguments(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows(6), eval_dataset=rows(4), compute_metrics=measure,
        callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.label_names == ["labels"]
    answer = trainer.evaluate()
    inputs = torch.stack([row["input_ids"] for row in rows(4)])
    assert answer["eval_loss"] == pytest.approx(float(model.eval()(inputs, labels=inputs).loss.detach()), rel=1e-4)
    predictions, labels = seen[-1]
    assert isinstance(predictions, np.ndarray) and predictions.shape == (4, 10, VOCAB) and labels.shape == (4, 10)


def test_trainer_steps_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    """Gradient checkpointing on, two micro-batches a step; losses are means over all labels of a step."""
    batches = [make_tokens(2, 9, seed=seed) for seed in range(4)]
    model, other = make_model(), make_model()
    arguments = training_arguments(
        tmp_path, max_steps=2, gradient_accumulation_steps=2, gradient_checkpointing=True, lr_scheduler_type="constant",
        max_grad_norm=1e9, train_sampling_strategy="sequential",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    said = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    expected = []
    for first, second in (batches[:2], batches[2:]):
        loss = sum(other.train()(batch, labels=batch, num_items_in_batch=2 * 2 * 8).loss for batch in (first, second))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert said == pytest.approx(expected, rel=1e-4)


# --- generation configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written_by", ["save_pretrained", "by hand into a donor's file"])
def test_exit_entries_of_a_generation_config_survive(written_by: str, tmp_path: Path) -> None:
    model = make_model()
    if written_by == "save_pretrained":
        for name, value in EXIT.items():
            setattr(model.generation_config, name, value)
        model.save_pretrained(tmp_path)
        alone = GenerationConfig.from_pretrained(tmp_path)
        assert {name: getattr(alone, name, None) for name in EXIT_ARGUMENTS} == EXIT
    else:
        model.save_pretrained(tmp_path)
        values = {"_from_model_config": True, "eos_token_id": 3, **EXIT}
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
    loaded = RecursiveGPTForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.generation_config, name, None) for name in EXIT_ARGUMENTS} == EXIT
    loaded.generate(make_tokens(1, 4), max_new_tokens=2)
    assert loaded.last_exit_report is not None and max(loaded.last_exit_report.histogram) <= 2
    loaded.generate(make_tokens(1, 4), max_new_tokens=2, exit="kl")  # of the entries an exit takes what it reads
    loaded.save_pretrained(tmp_path / "again")
    again = RecursiveGPTForCausalLM.from_pretrained(tmp_path / "again").generation_config
    assert {name: getattr(again, name, None) for name in EXIT_ARGUMENTS} == EXIT
    (tmp_path / "generation_config.json").unlink()
    assert not hasattr(RecursiveGPTForCausalLM.from_pretrained(tmp_path).generation_config, "exit")


@pytest.mark.parametrize("where", ["argument", "given config", "folder"])
def test_a_depth_of_a_generation_is_of_that_call_alone(where: str, tmp_path: Path) -> None:
    model, tokens, settings = make_model(blocks=3), make_tokens(1, 8), {"max_new_tokens": 12, "do_sample": False}
    own, plan = model.generate(tokens, **settings), model.config.recursion_plan
    deep = {"num_refinement_blocks": 1, "exit": "argmax"}
    if where == "given config":
        deep = {"generation_config": GenerationConfig(**settings, **deep)}
    elif where == "folder":
        model.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps(deep))
        model, deep = RecursiveGPTForCausalLM.from_pretrained(tmp_path), {}
    found = model.generate(tokens, **settings, **deep)
    assert model.last_exit_report.histogram == {1: 19} and model.config.recursion_plan == plan
    model.set_num_refinement_blocks(1)
    assert torch.equal(model.generate(tokens, **settings), found) and not torch.equal(found, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_halting_head_stays_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = make_model(), make_tokens(2, 6)
    model.save_pretrained(tmp_path)
    loaded = RecursiveGPTForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    kinds = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert {name for name, kind in kinds.items() if kind != dtype} == {"halting_head.weight", "halting_head.bias"}
    assert loaded(tokens, output_blocks=True).block_halting.dtype == torch.float32
    assert loaded.to(dtype)(tokens, exit="halting").blocks.shape == (2, 6)  # cast by hand, it still computes
    assert loaded(tokens, labels=tokens).halt_loss.dtype == torch.float32


# --- what cannot be is said -----------------------------------------------------------------------------------------


def test_a_token_beyond_the_vocabulary_is_said() -> None:
    model, tokens = make_model(), make_tokens(1, 4)
    tokens[0, 2] = VOCAB + 7
    with pytest.raises(ValueError, match=f"token id {VOCAB + 7}, .* vocabulary of {VOCAB}"):
        model.generate(tokens, max_new_tokens=2)
    with pytest.raises(ValueError, match="token id -1, "):
        model.generate(torch.tensor([[1, -1]]), max_new_tokens=2)


def test_positions_past_the_learned_ones_are_said_whoever_gives_them() -> None:
    model = make_model(position_embedding="learned", max_position_embeddings=16)
    for exit in (None, "halting"):
        with pytest.raises(ValueError, match="16 learned positions, but position 16 was"):
            model.generate(make_tokens(1, 12), max_new_tokens=20, exit=exit)
    with pytest.raises(ValueError, match="16 learned positions"):
        model(make_tokens(1, 2), position_ids=torch.tensor([[15, 16]]))
    tokens, mask = left_padded(make_tokens(1, 20), [10])  # ten tokens behind padding have room
    assert model.generate(tokens, attention_mask=mask, max_new_tokens=6, min_new_tokens=6).shape == (1, 26)
    with pytest.raises(ValueError, match="16 learned positions"):
        model.generate(tokens, attention_mask=mask, max_new_tokens=8, min_new_tokens=8)


# --- assistants -----------------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3,
    )).eval()  # fmt: skip


@pytest.mark.parametrize("where", ["argument", "generation config"])
@pytest.mark.parametrize("assistant", ["llama", "recursive", "prompt lookup"])
def test_an_assistant_changes_nothing_of_what_an_exit_says(assistant: str, where: str) -> None:
    model, tokens = make_model(blocks=4, latents=1), make_tokens(1, 8)
    exit = {"exit": "halting", "halt_threshold": 0.55}
    helped: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if assistant == "llama":
        helped = {"assistant_model": llama()}
    elif assistant == "recursive":
        helped = {"assistant_model": make_model(blocks=1, latents=1)}
    if where == "generation config":
        for name, value in exit.items():
            setattr(model.generation_config, name, value)
        exit = {}
    settings = {"max_new_tokens": 12, "do_sample": False, **exit}
    expected = model.generate(tokens, **settings)
    full = model.generate(tokens, **{**settings, "exit": "none"})
    assert not torch.equal(expected, full)  # the exit does say something else
    assert torch.equal(model.generate(tokens, **settings, **helped), expected)
    assert model.last_exit_report is not None and len(model.last_exit_report.histogram) > 1
    if assistant == "recursive":
        assert helped["assistant_model"].last_exit_report is None


def test_transformers_own_early_exit_is_refused() -> None:
    with pytest.raises(ValueError, match="assistant_early_exit stops within a plan of passes"):
        make_model().generate(make_tokens(1, 6), max_new_tokens=12, do_sample=False, assistant_early_exit=6)


def test_a_depth_is_not_set_by_loading(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"call model.set_num_refinement_blocks\(5\)"):
        RecursiveGPTForCausalLM.from_pretrained(tmp_path, num_refinement_blocks=5)
