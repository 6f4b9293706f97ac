"""The tokenizer of a conversion: all of its files, loaded as the class that the donor's was, the same ids proven.

``AutoTokenizer`` chooses the class by the model type of the config.json beside a tokenizer too, and some classes build
their own pre-tokenizer over the one in tokenizer.json. The same files would give other ids in a checkpoint, where there
is no config.json, or in an export, where it is of another model type. What is written therefore names the one class
that takes tokenizer.json as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_recursive.data.tokenizer import CONFIG, VOCABULARIES, load_tokenizer, name_class, tokenizer_files
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.files import check_settings

SETTINGS = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PROBES = (
    "1234 5678 12345678 3.14159, 1,000,000 and 2026-01-31; I'LL don't",
    " two  three   spaces\t a tab\n\n\r\nand lines  \n",
    "def f(x: int) -> None:\n    return {'a': x ** 2, \"b\": [0x1F, 1e-3]}  # done\n<s></s>",
    "naïve café cafe\u0301 Ångström Straße; Привет, мир; Γειά σου; שלום; مرحبا; नमस्ते",
    "你好世界。こんにちは 안녕하세요 \U0001f469\u200d\U0001f4bb\U0001f642 \u2028\ufeff",
)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the files of a tokenizer (and the generation settings beside them); False where there is none."""
    files = tokenizer_files(source)
    if not any(file.match(pattern) for file in files for pattern in VOCABULARIES):
        return False
    for file in files:
        if file.name in (SETTINGS, CONFIG, "tokenizer.json", "special_tokens_map.json"):
            check_settings(file)
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    return True


def tokenizer_of(folder: Path, **options: Any) -> Any:
    """The tokenizer of a model's folder; None where there is none that loads."""
    if not options and not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        return None  # transformers may build one without a vocabulary
    from transformers import AutoConfig

    from megatron_recursive.hf.model.configuration_recursive_gpt import RecursiveGPTConfig

    AutoConfig.register(RecursiveGPTConfig.model_type, RecursiveGPTConfig, exist_ok=True)  # or it warns of the unknown
    try:
        return load_tokenizer(folder, **options)
    except UserError:
        return None


def keep_class(tokenizer: Any, folder: Path) -> None:
    """Have the tokenizer files of a folder load as ``tokenizer`` does, whatever model they stand beside."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return  # it is not made of a tokenizer.json
    name_class(folder)
    alone = tokenizer_of(folder)
    if alone is None or reading(alone) != reading(tokenizer):
        tokenizer.save_pretrained(folder)
        name_class(folder)


def last_id(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values())


def reading(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer makes of a fixed text of digits, spaces, code and scripts, and of each of its added tokens."""
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    texts = [*PROBES, *(f"a{token} b" for token in added)]
    ids = tokenizer(texts)["input_ids"]
    return {
        "ids": ids, "ids without special tokens": tokenizer(texts, add_special_tokens=False)["input_ids"],
        "text of the ids": tokenizer.batch_decode(ids), "chat template": tokenizer.chat_template,
        "special ids": [getattr(tokenizer, name) for name in (*TOKEN_IDS, "unk_token_id")],
    }  # fmt: skip


def difference(before: Any, after: Any) -> str | None:
    """What two tokenizers make otherwise of the fixed text; None where nothing."""
    if after is None:
        return "it no longer loads"
    first, second = reading(before), reading(after)
    for what, value in first.items():
        if second[what] != value:
            if what.startswith("ids"):
                was, now = next((a, b) for a, b in zip(value, second[what], strict=True) if a != b)
                return f"{len(was)} ids of a text are now {len(now)}: {was[:8]} and {now[:8]}"
            return f"its {what} changed"
    return None


def prove_ids(before: Any, folder: Path, name: str) -> str | None:
    """Compare the tokenizer of a written folder with the one that it was made of; a sentence where nobody can.

    Raises:
        UserError: it says otherwise.
    """
    if before is None:
        return f"the tokenizer of {name} does not load here, so that its ids are unproven."
    found = difference(before, tokenizer_of(folder))
    if found is not None:
        raise UserError(f"The tokenizer of {name} would change ({found}); nothing was written.")
    return None


def token_ids(folder: Path, others: Mapping[str, Any], vocab_size: int | None = None) -> dict[str, Any]:
    """Begin, end and padding ids: of the generation settings, or else of ``others`` (a config.json, a tokenizer), or
    else None; None too for what a vocabulary of this size has not."""
    file = folder / SETTINGS
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = {name: values.get(name) if values.get(name) is not None else others.get(name) for name in TOKEN_IDS}
    for name, value in ids.items():
        several = value if isinstance(value, list) else [] if value is None else [value]
        if vocab_size is not None and not all(0 <= each < vocab_size for each in several):
            ids[name] = [each for each in several if 0 <= each < vocab_size] or None
    return ids


def also_turn_ends(ends: int | list[int] | None, tokenizer: Any) -> list[int] | None:
    """End ids with those that close an answer by the chat template: a donor without one knows its documents' alone."""
    from megatron_recursive.data.chat.supervision import Template

    several = ends if isinstance(ends, list) else [] if ends is None else [ends]
    with suppress(UserError):  # without a template that is its default
        several = [*several, *Template(tokenizer).end_ids]
    return [*dict.fromkeys(several)] or None


def write_settings(folder: Path, ids: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """Complete the generation settings; without the mark by which transformers drops entries of our own (exits)."""
    file = folder / SETTINGS
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in ("_from_model_config", *without):
        values.pop(name, None)
    values.update(ids)
    values = {name: value for name, value in values.items() if value is not None or name not in ids}  # none, or not one
    if values or file.is_file():
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
