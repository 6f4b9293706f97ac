"""How a model does at held-out turns of an assistant: what it thinks of them, and its own answers beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import batched, groupby, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_recursive.command_line import command
from megatron_recursive.data.indexed import check_indexed_dataset
from megatron_recursive.data.preparation import read_preparation, vocabulary_digest
from megatron_recursive.errors import UserError
from megatron_recursive.inference.generation import Settings, generate, room_for, text_after
from megatron_recursive.inference.loading import Loaded
from megatron_recursive.inference.text import Text, TokenizerText

Sample = tuple[list[int], bytes]  # token ids, and for each 1 where the assistant speaks
Turn = tuple[list[int], list[int]]  # token ids of the prompt, and of what the assistant said


def measure(loaded: Loaded, data: str, settings: Settings, most: int, batch_size: int) -> dict[str, Any]:
    """The record of a model: at most so many conversations, all turns of the assistant in them.

    Raises:
        UserError: the data cannot be read, is not of this model's tokens, or fits into it nowhere.
    """
    given = [*islice(read_samples(loaded.text, data), most)]
    samples = [each for each in given if len(each[0]) <= (loaded.max_positions or math.inf)]
    if not samples:
        raise UserError(f"--data {data} has no conversation that fits into {loaded.name}; give another file.")
    largest, size = max(max(ids) for ids, _ in samples), loaded.model.config.vocab_size
    if largest >= size:
        raise UserError(f"--data {data} has the token id {largest}, but {loaded.name} has {size} tokens; prepare it "
                        "with the model's tokenizer.")  # fmt: skip
    record = {"conversations": len(samples), "left_out": len(given) - len(samples)}
    return record | _judged(loaded, samples, settings, batch_size) | _answered(loaded, samples, settings, batch_size)


def read_samples(text: Text, data: str) -> Iterator[Sample]:
    """The conversations of a file, by the tokenizer's template, or those of what prepare-chat has written."""
    if Path(f"{data}.idx").is_file():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        _check_prepared(text, data)
        for ids, counted in zip(IndexedDataset(data), IndexedDataset(f"{data}_supervised"), strict=True):
            yield ids.tolist(), counted.tobytes()
        return
    if not isinstance(text, TokenizerText) or not text.has_chat_template:
        raise UserError(f"--data {data} is written by a chat template, which the model's tokenizer has not; give "
                        f"--tokenizer DIR, or the PREFIX of {command('prepare-chat')}.")  # fmt: skip
    from megatron_recursive.data.chat.formats import iter_conversations
    from megatron_recursive.data.chat.options import ChatOptions
    from megatron_recursive.data.chat.samples import samples_of
    from megatron_recursive.data.chat.supervision import chat_encoder
    from megatron_recursive.data.readers import refuse
    from megatron_recursive.data.sources import find_files, whole
    from megatron_recursive.data.work_folder import PartReport

    template, rust = chat_encoder(text.tokenizer)
    for file in find_files([data]):
        for conversation in iter_conversations(whole(file), ChatOptions(), refuse):
            yield from samples_of([conversation], template, rust, ChatOptions(), PartReport(), refuse)


def _check_prepared(text: Text, data: str) -> None:
    check_indexed_dataset(data)
    if not Path(f"{data}_supervised.idx").is_file():
        raise UserError(f"--data {data} does not say where the assistant speaks ({data}_supervised.idx is missing); "
                        f"write it with {command('prepare-chat')}.")  # fmt: skip
    check_indexed_dataset(f"{data}_supervised")
    made = read_preparation(data)
    if made is not None and isinstance(text, TokenizerText):
        if vocabulary_digest(text.tokenizer.get_vocab(), made.vocab_size) != made.vocabulary:
            raise UserError(f"--data {data} was prepared with the tokenizer {made.tokenizer}, which is not the model's; "
                            "prepare it with the model's, or give --tokenizer DIR.")  # fmt: skip


@torch.no_grad()
def _judged(loaded: Loaded, samples: Sequence[Sample], settings: Settings, batch_size: int) -> dict[str, Any]:
    """Loss and accuracy at the assistant's tokens, each given those before it."""
    count, loss, right, blocks = 0, 0.0, 0, 0
    ordered = sorted(samples, key=lambda each: len(each[0]))
    for batch in batched(tqdm(ordered, "perplexity", unit="conversation", disable=None), batch_size):
        width = max(len(ids) for ids, _ in batch)
        # What is filled up stands behind, where no earlier token sees it.
        ids_BS = torch.tensor([ids + ids[:1] * (width - len(ids)) for ids, _ in batch], device=loaded.model.device)
        asked_BS = torch.tensor([[*mask.ljust(width, b"\0")] for _, mask in batch], device=ids_BS.device)[:, 1:].bool()
        said = loaded.model(input_ids=ids_BS[:, :-1], use_cache=False, **settings.exit_arguments)
        logits_NV, labels_N = said.logits[asked_BS].float(), ids_BS[:, 1:][asked_BS]
        count += len(labels_N)
        loss += float(F.cross_entropy(logits_NV, labels_N, reduction="sum"))
        right += int((logits_NV.argmax(-1) == labels_N).sum())
        blocks += int(said.blocks[asked_BS].sum()) if settings.exit_arguments else 0
    loss /= count
    found = {"tokens": count, "loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": right / count}
    return found | ({"mean_blocks": blocks / count} if settings.exit_arguments else {})


def turns_of(samples: Sequence[Sample], ends: Sequence[int]) -> list[Turn]:
    """Every turn of the assistant that has a prompt, without its end token."""
    turns = []
    for ids, mask in samples:
        start = mask.find(b"\1", 2)  # a sample that was split begins within an answer
        while start > 0:
            stop = mask.find(b"\0", start)
            stop = len(ids) if stop < 0 else stop
            if not mask[start - 1]:
                turns.append((ids[:start], ids[start : stop - (ids[stop - 1] in ends)]))
            start = mask.find(b"\1", stop)
    return turns


def _answered(loaded: Loaded, samples: Sequence[Sample], settings: Settings, batch_size: int) -> dict[str, Any]:
    """The model's own answers after the true turns before them, against the true ones."""
    from sacrebleu.metrics.bleu import BLEU

    lasts = Counter(ids[mask.rindex(b"\1")] for ids, mask in samples)
    ends = loaded.text.turn_end_ids or [lasts.most_common(1)[0][0]]
    turns = turns_of(samples, ends)
    if not turns:
        return {"turns": 0}
    room = [room_for(loaded, prompt, settings) for prompt, _ in turns]
    ordered, answers = sorted(range(len(turns)), key=lambda each: (room[each], len(turns[each][0]))), [""] * len(turns)
    ended = 0
    with tqdm(total=len(turns), desc="answers", unit="turn", disable=None) as bar:
        for _, group in groupby(ordered, lambda each: room[each]):
            for batch in batched(group, batch_size):
                for turn, answer in zip(batch, generate(loaded, [turns[each][0] for each in batch], settings,
                                                        stop_ids=ends), strict=True):  # fmt: skip
                    answers[turn], ended = answer.text, ended + (answer.finish_reason == "stop")
                bar.update(len(batch))
    references = [text_after(loaded, prompt, said) for prompt, said in turns]
    bleu = BLEU()
    return {
        "turns": len(turns), "ended": ended / len(turns),
        "bleu": bleu.corpus_score(answers, [references]).score, "bleu_signature": str(bleu.get_signature()),
        "exact_match": sum(a.strip() == b.strip() for a, b in zip(answers, references, strict=True)) / len(turns),
        **{f"distinct_{n}": distinct(answers, n) for n in (1, 2)},
        **{f"references_distinct_{n}": distinct(references, n) for n in (1, 2)},
        "answers": [{"reference": b, "answer": a} for a, b in zip(answers, references, strict=True)],
    }  # fmt: skip


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words among all of all texts (Li et al. 2016, arXiv 1510.03055)."""
    words = [text.split() for text in texts]
    grams = [tuple(each[at : at + n]) for each in words for at in range(len(each) - n + 1)]
    return len({*grams}) / len(grams) if grams else 0.0
