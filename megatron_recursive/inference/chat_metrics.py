"""How a model does at held-out turns of an assistant: what it makes of them, and its own answers beside them."""

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
from megatron_recursive.data.joining import SUPERVISED
from megatron_recursive.data.preparation import read_preparation, vocabulary_digest
from megatron_recursive.data.splits import unread_documents
from megatron_recursive.errors import UserError
from megatron_recursive.inference.generation import Settings, generate, room_for, text_after
from megatron_recursive.inference.loading import Loaded
from megatron_recursive.inference.text import TokenizerText

Sample = tuple[list[int], bytes]  # token ids, and for each 1 where the assistant speaks


def measure(loaded: Loaded, data: str, settings: Settings, most: int, batch_size: int) -> dict[str, Any]:
    """Of at most so many conversations, with all turns of the assistant in them.

    Raises:
        UserError: the data cannot be read, is not of this model's tokens, or fits into it nowhere.
    """
    given = [*islice(read_samples(loaded, data), most)]
    samples = [each for each in given if len(each[0]) <= (loaded.max_positions or math.inf)]
    if not samples:
        raise UserError(f"--data {data} has no conversation that fits into {loaded.name}; give another file.")
    largest, size = max(max(ids) for ids, _ in samples), loaded.model.config.vocab_size
    if largest >= size:
        raise UserError(f"--data {data} has the token id {largest}, but {loaded.name} has {size} tokens; prepare it "
                        "with the model's tokenizer.")  # fmt: skip
    record = {"conversations": len(samples), "left_out": len(given) - len(samples)}
    return record | _judged(loaded, samples, settings, batch_size) | _answered(loaded, samples, settings, batch_size)


def read_samples(loaded: Loaded, data: str) -> Iterator[Sample]:
    """The conversations of a file, by the tokenizer's template, or those that prepare-chat has written."""
    text = loaded.text
    if Path(f"{data}.idx").is_file():
        from megatron_recursive.data.chat.dataset import IndexedDataset, chat_lengths

        documents = unread_documents(data, len(chat_lengths(data)), loaded.trained, loaded.name)
        made = read_preparation(data)
        if made is not None and isinstance(text, TokenizerText):
            if vocabulary_digest(text.tokenizer.get_vocab(), made.vocab_size) != made.vocabulary:
                raise UserError(f"--data {data} was prepared with another tokenizer than the "
                                "model's; prepare it with the model's, or give --tokenizer DIR.")  # fmt: skip
        tokens, supervised = IndexedDataset(data), IndexedDataset(f"{data}{SUPERVISED}")
        yield from ((tokens.get(each).tolist(), supervised.get(each).tobytes()) for each in documents)
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
    for file in find_files([data], flag="--data"):
        for conversation in iter_conversations(whole(file), ChatOptions(), refuse):
            yield from samples_of([conversation], template, rust, ChatOptions(), PartReport(), refuse)


@torch.no_grad()
def _judged(loaded: Loaded, samples: Sequence[Sample], settings: Settings, batch_size: int) -> dict[str, Any]:
    """Loss and accuracy at the assistant's tokens, each given those before it."""
    count, loss, right, blocks = 0, 0.0, 0, 0
    progress = tqdm(sorted(samples, key=lambda each: len(each[0])), "perplexity", disable=None)
    for batch in batched(progress, batch_size):
        width = max(len(ids) for ids, _ in batch)  # what fills up stands behind, where no earlier token sees it
        ids_BS = torch.tensor([ids + ids[:1] * (width - len(ids)) for ids, _ in batch], device=loaded.model.device)
        asked_BS = torch.tensor([[*mask.ljust(width, b"\0")] for _, mask in batch], device=ids_BS.device)[:, 1:].bool()
        said = loaded.model(input_ids=ids_BS[:, :-1], use_cache=False, **settings.exit_arguments)
        logits_NV, labels_N = said.logits[asked_BS].float(), ids_BS[:, 1:][asked_BS]
        count += len(labels_N)
        loss += float(F.cross_entropy(logits_NV, labels_N, reduction="sum"))
        right += int((logits_NV.argmax(-1) == labels_N).sum())
        blocks += int(said.blocks[asked_BS].sum()) if settings.exit is not None else 0
    found = {"tokens": count, "loss": loss / count, "perplexity": math.exp(loss / count), "accuracy": right / count}
    return found | ({"mean_blocks": blocks / count} if settings.exit is not None else {})


def turns_of(samples: Sequence[Sample], ends: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer, without its end token, of every turn of the assistant that has a prompt."""
    turns = []
    for ids, mask in samples:
        stop = 0
        while (start := mask.find(b"\1", stop)) >= 0:
            stop = mask.find(b"\0", start) if b"\0" in mask[start:] else len(ids)
            if start > 1:  # a sample that was split begins within an answer
                turns.append((ids[:start], ids[start : stop - (ids[stop - 1] in ends)]))
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
    ordered = sorted(range(len(turns)), key=lambda each: (room[each], len(turns[each][0])))
    answers: dict[int, Any] = {}
    with tqdm(total=len(turns), desc="answers", disable=None) as progress:
        for _, group in groupby(ordered, lambda each: room[each]):
            for batch in batched(group, batch_size):
                found = generate(loaded, [turns[each][0] for each in batch], settings, stop_ids=ends)
                answers.update(zip(batch, found, strict=True))
                progress.update(len(batch))
    said = [answers[each].text.strip() for each in range(len(turns))]
    true = [text_after(loaded, *turn).strip() for turn in turns]
    bleu = BLEU()
    return {
        "turns": len(turns), "ended": sum(each.finish_reason == "stop" for each in answers.values()) / len(turns),
        "bleu": bleu.corpus_score(said, [true]).score, "bleu_signature": str(bleu.get_signature()),
        "exact_match": sum(map(str.__eq__, said, true)) / len(turns),
        "distinct_1": distinct(said, 1), "distinct_2": distinct(said, 2),
        "true_distinct_1": distinct(true, 1), "true_distinct_2": distinct(true, 2),
        "answers": [{"true": true, "said": said} for true, said in zip(true, said, strict=True)],
    }  # fmt: skip


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words among all of all texts (Li et al. 2016, arXiv 1510.03055); None of none."""
    grams = [tuple(words[at : at + n]) for words in map(str.split, texts) for at in range(len(words) - n + 1)]
    return len({*grams}) / len(grams) if grams else None
