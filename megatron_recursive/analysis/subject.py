"""What is looked at: a model with its layers, and the text on which they are judged."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_recursive.backends.device import of_this_process
from megatron_recursive.data.cpython_corpus import cpython_documents, is_held_out
from megatron_recursive.data.hub import HubChoice
from megatron_recursive.data.readers import iter_documents
from megatron_recursive.data.sources import find_files
from megatron_recursive.data.tokenizer import load_tokenizer
from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert.gguf_file import gguf_tokenizer
from megatron_recursive.hf.convert.sources import open_source
from megatron_recursive.inference.loading import NEEDS_ITS_OWN, Loaded, open_model
from megatron_recursive.inference.text import NumberText, Text, TokenizerText


@contextlib.contextmanager
def open_subject(
    given: str, tokenizer: str | None, device: str | None, numbers: bool = False
) -> Iterator[Loaded]:  # fmt: skip
    """As :func:`open_model`; a GGUF file is dequantised to float32, and has its own tokenizer."""
    if not given.endswith(".gguf"):
        with open_model(given, tokenizer=tokenizer, device=device, numbers=numbers) as loaded:
            yield loaded
        return
    from transformers import AutoModelForCausalLM

    source = open_source(given)
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    model.load_state_dict({name: source.weight(name) for name in model.state_dict()})
    found = (load_tokenizer(tokenizer, NEEDS_ITS_OWN) if tokenizer is not None
             else gguf_tokenizer(Path(given)))  # fmt: skip
    if found is None:
        raise UserError(f"--model {given} has no tokenizer that loads here; give --tokenizer DIR.")
    model = model.to(of_this_process(device)).eval()
    yield Loaded(given, model, TokenizerText(found), source.arch.max_positions, recursive=False)


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder layers of such a model, of transformers or of Megatron."""
    found = model.megatron.decoder.layers if hasattr(model, "megatron") else getattr(model.base_model, "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise UserError(f"--model is a {type(model).__name__}, no model of a family that convert import takes.")
    return list(found)


def text_rows(
    text: Text, inputs: Sequence[str], samples: int, length: int, json_key: str = "text", hub: HubChoice | None = None,
    ahead: int = 0,
) -> Tensor:  # fmt: skip
    """Token ids [N, length] of documents one behind the other, with the end token between them.

    Args:
        ahead: so many tokens of the next row stand at the end of each, for it to predict.
        inputs: as ``preprocess`` reads them; none for what ``corpus`` holds out of the text that CPython ships, its
            parts mixed in a fixed order.

    Raises:
        UserError: they cannot be read, or hold not enough for one row.
    """
    if not inputs and isinstance(text, NumberText):
        raise UserError("The model has no tokenizer; name its text in token ids with --text, or give --tokenizer.")
    ids: list[int] = []
    for document in _documents(inputs, json_key, hub):
        encoded, end = text.encode(document), text.end_ids[:1]
        ids += encoded if encoded[-1:] == end else encoded + end  # some tokenizers end a text themselves
        if len(ids) >= samples * length + ahead:
            break
    rows = min(samples, (len(ids) - ahead) // length)
    if rows <= 0:
        raise UserError(f"--text has {len(ids)} tokens, fewer than one sample of --seq-length {length}; lower it.")
    return torch.tensor(ids[: rows * length + ahead]).unfold(0, length + ahead, length)


def _documents(inputs: Sequence[str], json_key: str, hub: HubChoice | None) -> Iterator[str]:
    if not inputs:
        documents = [each for each in cpython_documents() if is_held_out(each.id)]
        yield from (each.text for each in random.Random(0).sample(documents, len(documents)))
        return
    yield from (each.text for each in iter_documents(find_files(inputs, hub, flag="--text"), json_key))


def fingerprint(given: str) -> list[tuple[str, int, int]]:
    """Changes with the files of a model; measurements that are on their way among them are none."""
    files = [Path(given), *Path(given).rglob("*")]
    return sorted(
        (str(each), each.stat().st_size, each.stat().st_mtime_ns)
        for each in files
        if each.is_file() and not each.parent.name.endswith(".parts")
    )
