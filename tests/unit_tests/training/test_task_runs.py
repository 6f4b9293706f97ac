"""Training on made-up tasks: what Megatron reads, and the loss at answers that are hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_recursive.data.tasks import ANSWERS, VOCAB_SIZE, Addition, Hops, read_task, write_task
from tests.distributed import run_distributed
from tests.unit_tests.training.runs import FLAGS, copy_checkpoint, losses_of, save_to, train


def _samples(prefix: str, length: int, wanted: int) -> list[tuple[list[int], list[int], list[float]]]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    tokenizer: Any = NullTokenizer(VOCAB_SIZE)
    tokenizer.pad, tokenizer.special_tokens_dict = tokenizer.pad_id, {}
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=length, blend_per_split=[([prefix], None), None, None], tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )  # fmt: skip
    data = BlendedMegatronDatasetBuilder(GPTDataset, [wanted, 0, 0], lambda: True, config).build()[0]
    return [(each["tokens"].tolist(), each["labels"].tolist(), each["loss_mask"].tolist()) for each in data]


@pytest.mark.parametrize("task", [Hops((1, 4)), Addition((2, 4))], ids=["hops", "addition"])
def test_megatron_reads_a_document_a_sample_also_in_later_epochs(tmp_path: Path, task: Hops | Addition) -> None:
    prefix = str(tmp_path / "train")
    write_task(task, tmp_path / "train", 40, (1, 0))
    documents = [row.tolist() for row in read_task(prefix)[1]]
    (samples,) = run_distributed(_samples, 1, prefix, task.seq_length, 100)
    assert len(samples) >= 100
    for tokens, labels, mask in samples:
        assert tokens in documents and labels[:-1] == tokens[1:] and labels[-1] < ANSWERS and min(mask) == 1
    assert {tuple(tokens) for tokens, _, _ in samples} == set(map(tuple, documents))


# --- the loss at answers --------------------------------------------------------------------------------------------


def _losses_of_checkpoint(folder: str, ids: list[int]) -> list[float]:
    """Cross-entropy after the last block at hidden answers, at all labels then, and at answers that are shown."""
    import torch

    from megatron_recursive.inference.megatron_model import open_megatron

    with open_megatron(folder) as (model, _), torch.no_grad():
        shown, labels = torch.tensor([ids]), torch.tensor(ids[1:] + ids[:1])
        hidden = torch.tensor([[0 if token >= ANSWERS else token for token in ids]])
        losses = [torch.nn.functional.cross_entropy(model(tokens).logits[0], labels, reduction="none")
                  for tokens in (hidden, shown)]  # fmt: skip
        asked = labels >= ANSWERS
        return [float(each.mean()) for each in (losses[0][asked], losses[0], losses[1][asked])]


class SameAgain(Hops):
    """A task whose documents are all the same one."""

    def documents(self, random: numpy.random.Generator, count: int) -> Any:
        return numpy.tile(super().documents(numpy.random.default_rng(3), 1), (count, 1))


def test_the_loss_is_that_of_hidden_answers_on_one_stage_and_on_two(tmp_path: Path) -> None:
    """Nothing moves the weights, so that the loss of the first iteration can be told from the checkpoint."""
    task = SameAgain((2,), length=8)
    write_task(task, tmp_path / "train", 40, (1, 0))
    data = ["--train-data-path", str(tmp_path / "train"), "--valid-data-path", str(tmp_path / "train")]
    flags = [word for word in FLAGS if word not in ("--mock-data", "--split", "90,5,5")]
    still = "--hidden-dropout 0 --attention-dropout 0 --init-method-std 0.3 --lr 1e-12 --train-iters 4".split()
    words = [*data, *still, "--vocab-size", str(VOCAB_SIZE), "--answer-tokens", str(ANSWERS), "--no-load-rng"]
    assert train(*words, *save_to(tmp_path / "one", 2), "--exit-interval", "2", flags=flags) is None
    copy_checkpoint(tmp_path / "one", tmp_path / "two", 2)
    stages = ["--pipeline-model-parallel-size", "2"]
    assert train(*words, *save_to(tmp_path / "two", 2), *stages, flags=flags, world_size=2) is None
    losses = {**losses_of(tmp_path / "one"), **losses_of(tmp_path / "two")}
    ids = read_task(str(tmp_path / "train"))[1][0].tolist()
    ((answers, *others),) = run_distributed(_losses_of_checkpoint, 1, str(tmp_path / "one"), ids)
    assert min(abs(answers - other) for other in others) > 0.01 * answers
    assert losses == pytest.approx(dict.fromkeys((1, 2, 3, 4), answers), rel=1e-5)
