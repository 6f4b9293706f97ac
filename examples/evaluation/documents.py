"""Documents of the offline tasks, from the prose that every CPython carries (``megatron-recursive corpus``).

Evaluated is what the corpus holds out, so that a model trained on its other part has not seen it. The text depends on
the Python version. The harness calls these functions by the names that the YAML files beside this one give.
"""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval import tasks

from megatron_recursive.data.cpython_corpus import cpython_documents, is_held_out


@functools.cache
def paragraphs(held_out: bool) -> tuple[str, ...]:
    """Prose of at least 20 words: no code, tables, grammar or headings."""
    found = []
    for document in cpython_documents():
        if is_held_out(document.id) == held_out:
            for text in document.text.split("\n\n"):
                is_prose = not re.search(r"^ {3,}|[*#<>|=_]{2}|::", text, re.MULTILINE)
                if is_prose and text.endswith(".") and len(text.split()) >= 20:
                    found.append(" ".join(text.split()))
    return tuple(dict.fromkeys(found))


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)


def test_split(documents: list[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(documents)}


def cloze(**_: Any) -> dict[str, datasets.Dataset]:
    """As LAMBADA: the last word of a passage, which stands in it before."""
    found = [re.fullmatch(r"(.*) ([A-Za-z]{4,})\.", text) for text in paragraphs(True)]
    return test_split([{"context": each[1], "word": each[2]} for each in found
                       if each and re.search(rf"\b{each[2]}\b", each[1])])  # fmt: skip


def choice(**_: Any) -> dict[str, datasets.Dataset]:
    """As HellaSwag: which of four sentences ends a passage; the others end other passages."""
    drawn, documents = random.Random(1234), []
    texts = [sentences(text) for text in paragraphs(True) if len(sentences(text)) > 1]
    ends = sorted({text[-1] for text in texts})
    for text in texts:
        choices = [text[-1], *drawn.sample([end for end in ends if end != text[-1]], 3)]
        drawn.shuffle(choices)
        documents.append({"context": " ".join(text[:-1]), "choices": choices, "label": choices.index(text[-1])})
    return test_split(documents)


def count(**_: Any) -> dict[str, datasets.Dataset]:
    """Of how many words is a sentence?"""
    return test_split([counted(text) for text in countable(True)])


def count_exemplars() -> list[dict[str, str]]:
    return [counted(text) for text in countable(False)[:8]]


def countable(held_out: bool) -> list[str]:
    plain = (text for each in paragraphs(held_out) for text in sentences(each) if re.fullmatch(r"[A-Za-z' ]+\.", text))
    return list(dict.fromkeys(text for text in plain if 5 <= len(text.split()) <= 12))


def counted(sentence: str) -> dict[str, str]:
    words = sentence.rstrip(".").split()
    steps = ", ".join(f"{word} is {number}" for number, word in enumerate(words, 1))
    return {"question": f'How many words has the sentence "{sentence}"?', "target": f"{steps}. The answer is "
            f"{len(words)}."}  # fmt: skip


def gsm8k_exemplars() -> list[dict[str, str]]:
    """The eight questions, with their answers in steps, that the harness's own gsm8k_cot shows."""
    file = Path(tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
