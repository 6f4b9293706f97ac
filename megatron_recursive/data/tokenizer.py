"""Tokenizers: loading them from what a user names, and encoding many documents at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_recursive.command_line import command
from megatron_recursive.data.preparation import vocabulary_digest
from megatron_recursive.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[list[str]], list[list[int]]]
"""Token ids of each text, with the special tokens that the stored tokenizer puts around it; none of an empty text."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "tekken.json", "*.model", "*.model.v*", "*.tiktoken")
PATTERNS = (
    "*token*", "*vocab*", "*merges*", "*.model", "*.model.v*", "*.tiktoken", "*.jinja", "chat_template.json",
    "tekken.json", "generation_config.json", "additional_chat_templates/*.jinja",
    "LICEN[CS]E*", "NOTICE*",  # what comes with the donor's weights must go on with them
)  # fmt: skip
OTHERS = (".py", ".safetensors", ".bin", ".pt", ".pth", ".gguf")  # code and weights, whatever they are called
AS_IT_IS, CONFIG = "PreTrainedTokenizerFast", "tokenizer_config.json"  # the class is known to transformers 4 and 5
_MAKE = f"make one with {command('tokenizer')}"


@dataclass(frozen=True)
class TokenizerChoice:
    """What the user names: a folder, a SentencePiece .model or a name of the Hugging Face hub, or GPT-2's two files.

    ``special_tokens``: put around each document what the tokenizer puts around a text (BOS of Llama and Mistral), as
    Megatron's tokenizer and transformers do, and thus inference.
    """

    path: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    special_tokens: bool = True

    def check(self) -> TokenizerChoice:
        """Itself, if it names one tokenizer.

        Raises:
            UserError: it names none, two, or half of GPT-2's files.
        """
        files = [self.vocab_file is not None, self.merge_file is not None]
        if any(files) != all(files) or (self.path is not None) == any(files):
            raise UserError("give either --tokenizer, or both --vocab-file and --merge-file")
        return self

    def __str__(self) -> str:
        return self.path if self.path is not None else f"{self.vocab_file} and {self.merge_file}"


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer as one file, which other processes load in a moment.

    ``eod`` ends documents (None: there is none); ids are below ``id_range``; ``digest`` tells one from another,
    ``vocabulary`` only by what the ids stand for; ``name`` is what the user called it; ``special``: it puts tokens of
    its own around each text.
    """

    file: Path
    eod: int | None
    id_range: int
    digest: str
    vocabulary: str
    name: str
    special: bool = False


def is_hub_name(given: str | Path) -> bool:
    """Whether it can only be a name of the hub: MODEL, or ORG/MODEL where no folder here is called ORG."""
    path, text = Path(given), str(given)
    local = path.exists() or text[:1] in (".", "~", "/") or text.count("/") > 1 or text.endswith((".gguf", ".model"))
    return not local and ("/" not in text or not path.parent.is_dir())


def load_tokenizer(path: str | Path, mend: str = _MAKE, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder of Hugging Face's, or GPT-2's ``vocab.json`` and ``merges.txt``; or by a hub name.

    ORG/MODEL alone is downloaded: MODEL, which may be a mistyped folder, must be in the hub's cache. No code of a
    tokenizer is run. ``mend`` is what the user is told to do without one: a trained model needs its own. ``options``
    are those of ``AutoTokenizer.from_pretrained``.

    Raises:
        UserError: the folder is missing or holds no tokenizer that ``transformers`` can load.
    """
    folder, is_name = Path(path), is_hub_name(path)
    cached = not is_name or "/" not in str(path)
    if not is_name and not folder.is_dir():
        raise UserError(f"tokenizer folder {path} does not exist; {mend}")
    named = ("tokenizer.json", "tokenizer_config.json", "config.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        if not any((folder / name).is_file() for name in named):
            return gpt2_tokenizer(folder / "vocab.json", folder / "merges.txt")
    elif not is_name and not options and not any(any(folder.glob(name)) for name in (*VOCABULARIES, named[1])):
        raise UserError(f"{folder} holds no tokenizer (no tokenizer.json); {mend}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=cached, trust_remote_code=False, **options)
    # transformers and the Rust tokenizers raise bare Exception, ValueError, KeyError and OSError for a broken folder.
    except Exception as error:
        if is_name and isinstance(error, OSError):
            raise UserError(f"tokenizer {path} is neither a folder nor in the hub's cache; fetch it with hf download "
                            f"{path}, or {mend}") from error  # fmt: skip
        raise UserError(f"cannot load the tokenizer {path} ({_reason(error)}); check the name, or {mend}") from error


def gpt2_tokenizer(vocab_file: str | Path, merge_file: str | Path) -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer with the vocabulary and merges of two files; ``<|endoftext|>`` ends documents.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    from transformers import GPT2Tokenizer

    for flag, file in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not Path(file).is_file():
            raise UserError(f"{flag} {file} does not exist; name GPT-2's vocab.json and merges.txt")
    try:
        vocabulary = json.loads(Path(vocab_file).read_text("utf-8-sig"))
        lines = Path(merge_file).read_text("utf-8-sig").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        return GPT2Tokenizer(vocab=vocabulary, merges=merges)
    # As above: the Rust tokenizers raise a bare Exception for a merge that is no pair of known tokens.
    except Exception as error:
        raise UserError(
            f"--vocab-file {vocab_file} and --merge-file {merge_file} are no GPT-2 tokenizer ({_reason(error)}); "
            "name a matching vocab.json and merges.txt"
        ) from error


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a model's folder, the generation settings and the licence."""
    return sorted({file for pattern in PATTERNS for file in folder.glob(pattern)
                   if file.is_file() and file.suffix not in OTHERS})  # fmt: skip


def name_class(folder: Path) -> None:
    """Have the tokenizer of a folder load as its tokenizer.json is, whatever model it stands beside."""
    file = folder / CONFIG
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    values.pop("auto_map", None)
    file.write_text(json.dumps({**values, "tokenizer_class": AS_IT_IS}, indent=2, ensure_ascii=False) + "\n", "utf-8")


def id_range(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id, which can exceed ``len(tokenizer)`` when ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def open_tokenizer(choice: TokenizerChoice) -> tuple[PreTrainedTokenizerBase, Any]:
    """As transformers loads it, and what it runs in Rust."""
    if choice.vocab_file is not None and choice.merge_file is not None:
        tokenizer = gpt2_tokenizer(choice.vocab_file, choice.merge_file)
    else:
        tokenizer = load_tokenizer(str(choice.path))
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        raise UserError(f"{choice} is a tokenizer in Python, which is too slow here; convert it to a tokenizer.json")
    return tokenizer, rust


def store_tokenizer(choice: TokenizerChoice, folder: Path) -> StoredTokenizer:
    """Load the tokenizer that the user names, and write it into ``folder`` as ``tokenizer.json`` or ``.model``.

    Raises:
        UserError: there is no such tokenizer, or one that neither ``tokenizers`` nor SentencePiece can run.
    """
    model = _sentencepiece_model(choice.check())
    name = str(Path(choice.path).absolute()) if choice.path and Path(choice.path).exists() else str(choice)
    if model is not None:
        return _store_sentencepiece(model, folder, name)
    tokenizer, rust = open_tokenizer(choice)
    text = rust.to_str()
    file = folder / "tokenizer.json"
    file.write_text(text, "utf-8")
    known = id_range(tokenizer)
    vocabulary = vocabulary_digest(tokenizer.get_vocab(), known)
    special = choice.special_tokens and rust.num_special_tokens_to_add(False) > 0
    return StoredTokenizer(file, tokenizer.eos_token_id, known, _digest(text.encode()), vocabulary, name, special)


def _sentencepiece_model(choice: TokenizerChoice) -> Path | None:
    if choice.path is None:
        return None
    path = Path(choice.path)
    if path.name.endswith(".model"):
        if not path.is_file():
            raise UserError(f"--tokenizer {path} does not exist; {_MAKE}")
        return path
    known = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    if (path / "tokenizer.model").is_file() and not any((path / name).is_file() for name in known):
        return path / "tokenizer.model"
    return None


def _store_sentencepiece(model: Path, folder: Path, name: str) -> StoredTokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{model} is no SentencePiece model ({_reason(error)}); {_MAKE}") from error
    file = folder / "tokenizer.model"
    shutil.copyfile(model, file)
    eod, known = processor.eos_id(), processor.get_piece_size()
    vocabulary = vocabulary_digest({processor.id_to_piece(number): number for number in range(known)}, known)
    return StoredTokenizer(file, eod if eod >= 0 else None, known, _digest(file.read_bytes()), vocabulary, name)


@functools.lru_cache(maxsize=1)
def load_encoder(stored: StoredTokenizer) -> Encode:
    """What encodes texts with a stored tokenizer, in the calling thread (``TOKENIZERS_PARALLELISM`` may say more)."""
    if stored.file.suffix == ".model":
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(stored.file))
        return functools.partial(processor.encode, out_type=int, num_threads=1)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(stored.file))
    # Documents are neither cut nor filled up here, whatever a model's own tokenizer.json asks for.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    around = tokenizer.num_special_tokens_to_add(False) if stored.special else 0

    def encode(texts: list[str]) -> list[list[int]]:
        # Without the positions of tokens in the text, which nobody needs here.
        found = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=stored.special)]
        return [ids if len(ids) > around else [] for ids in found]

    return encode


def load_document_encoder(stored: StoredTokenizer, append_eod: bool = True) -> Encode:
    """What encodes documents: as :func:`load_encoder`, ended by the end-of-document token, and without empty ones."""
    encode, eod = load_encoder(stored), [stored.eod] if append_eod and stored.eod is not None else []
    # Some tokenizers end a text with it.
    return lambda texts: [
        ids if stored.special and ids[-1:] == eod else ids + eod for ids in filter(None, encode(texts))
    ]


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
