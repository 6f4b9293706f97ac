"""PEFT's adapters and TRL's trainers on a recursive model: the libraries themselves, a few steps on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit_tests.hf.recursive_models import make_model, make_tokens
from tests.unit_tests.models.comparing import relative_error, worst_error

pytestmark = pytest.mark.heavy

# What the guide says to adapt: every layer's matrices, and the head that decides when a token leaves.
SHARED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = [*SHARED, "halting_head"]


def adapted(model: Any, targets: list[str] | str | None = None, **kwargs: Any) -> Any:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets or TARGETS, r=4, lora_alpha=8, **kwargs)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zeros at first, so that gradients of A would be zeros
                parameter.normal_(std=0.2, generator=generator)
    return wrapped


@pytest.mark.parametrize("detach", [False, True])
def test_lora_gradients_are_the_chain_rule_of_the_dense_ones(detach: bool) -> None:
    """With W' = W + s B A, dL/dA = s B^T dL/dW' and dL/dB = s dL/dW' A^T, where dL/dW' sums over all passes."""
    tokens, knobs = make_tokens(2, 9), {"detach_between_refinements": detach}
    wrapped = adapted(make_model(recursion=knobs)).train()
    wrapped.gradient_checkpointing_enable()
    wrapped.enable_input_require_grads()
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[name], factors[name] = (a.grad, b.grad), (a.detach(), b.detach())
    assert len(found) == 2 * len(SHARED) + 1
    dense = adapted(make_model(recursion=knobs)).merge_and_unload().train()
    for parameter in dense.parameters():
        parameter.requires_grad_(True)
    dense(tokens, labels=tokens).loss.backward()
    for name, (a, b) in factors.items():
        of_weight = dense.get_submodule(name).weight.grad
        expected = {"A": 2 * b.T @ of_weight, "B": 2 * of_weight @ a.T}
        worst = worst_error(dict(zip("AB", found[name], strict=True)), expected)
        assert worst[0] < 2e-5, (name, worst)


def test_a_merged_adapter_says_the_same_and_leaves_at_the_same_blocks(tmp_path: Path) -> None:
    import peft

    tokens, exit = make_tokens(3, 12), {"exit": "halting", "halt_threshold": 0.5, "use_cache": False}
    plain = make_model(blocks=4, latents=1)
    with torch.no_grad():
        before = plain(tokens, **exit).blocks
        wrapped = adapted(plain).eval()
        expected = wrapped(input_ids=tokens, **exit)
        assert not torch.equal(expected.blocks, before)  # the adapter reaches the halting head
        wrapped.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(make_model(blocks=4, latents=1), tmp_path / "adapter").eval()
        for each in (loaded, wrapped.merge_and_unload()):
            said = each(input_ids=tokens, **exit)
            assert torch.equal(said.blocks, expected.blocks)
            assert relative_error(said.logits, expected.logits) < 1e-5


def test_all_linear_layers_can_be_adapted() -> None:
    """The map of state and input among them."""
    family = {"recursion_family": "recurrent", "injection": "concat"}
    wrapped = adapted(make_model(recursion=family, num_layers=4), "all-linear")
    wrapped(input_ids=make_tokens(1, 6), labels=make_tokens(1, 6)).loss.backward()
    assert wrapped.get_base_model().model.adapter.lora_A["default"].weight.grad.abs().max() > 0


def test_a_tuned_prefix_goes_with_an_exit() -> None:
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped, tokens = peft.get_peft_model(make_model(), config).eval(), make_tokens(2, 6)
    nobody = {"exit": "halting", "halt_threshold": 0.999}
    said = [wrapped.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, **each) for each in (nobody, {})]
    assert torch.equal(*said)


# --- TRL ------------------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, **{f"w{number}": number for number in range(2, 60)}}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def settings(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
            "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "use_cpu": True, "bf16": False, "logging_steps": 1,
            "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": True, "save_strategy": "no",
            "train_sampling_strategy": "sequential"}  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_sft_steps_are_those_of_a_loop_by_hand(with_adapter: bool, tmp_path: Path) -> None:
    """TRL takes hidden states to its own loss: cross-entropy after the last block, without the model's objective."""
    import datasets
    import peft
    import trl

    rows = make_tokens(4, 8, seed=3).clamp(min=2, max=59)
    data = datasets.Dataset.from_dict({"input_ids": rows.tolist()})
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=SHARED, r=4) if with_adapter else None
    model = make_model()
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**settings(tmp_path)), train_dataset=data, processing_class=tokenizer(), peft_config=config
    )
    said = losses(trainer)

    def loss_of(model: Any, batch: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    if with_adapter:
        assert all(torch.equal(start[n], p) for n, p in make_model().named_parameters())
        changed = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
        assert len(changed) == 14 and all(each.any() for each in changed)
        assert said[0] == pytest.approx(loss_of(make_model(), rows[:2]).item(), rel=1e-4)
        return
    other = make_model().train()
    optimizer, expected = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0), []
    for batch in rows.split(2):
        optimizer.zero_grad()
        loss = loss_of(other, batch)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert said == pytest.approx(expected, rel=1e-4)


def test_dpo_steps_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    """-log sigmoid(0.1 (chosen - rejected)), each the log-likelihood of an answer against the model's at the start."""
    import datasets
    import trl

    words = lambda ids: " ".join(f"w{each}" for each in ids)  # noqa: E731
    triples = [([2 + k, 9], [20 + k, 30], [40 + k, 50]) for k in range(4)]
    data = datasets.Dataset.from_list([
        {"prompt": words(p), "chosen": " " + words(c), "rejected": " " + words(r)} for p, c, r in triples
    ])  # fmt: skip
    trainer = trl.DPOTrainer(
        make_model(), make_model(), trl.DPOConfig(beta=0.1, **settings(tmp_path)), train_dataset=data,
        processing_class=tokenizer(),
    )  # fmt: skip
    said = losses(trainer)

    def likelihood(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
        tokens = torch.tensor([[*prompt, *answer, 1]])
        log_p = model(tokens).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        return log_p.gather(1, tokens[0, len(prompt) :, None]).sum()

    policy, reference, expected = make_model().train(), make_model(), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    for batch in (triples[:2], triples[2:]):
        terms = []
        for prompt, chosen, rejected in batch:
            with torch.no_grad():
                start = likelihood(reference, prompt, chosen) - likelihood(reference, prompt, rejected)
            margin = likelihood(policy, prompt, chosen) - likelihood(policy, prompt, rejected) - start
            terms.append(-torch.nn.functional.logsigmoid(0.1 * margin))
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert said == pytest.approx(expected, rel=1e-4)
