"""The steps of datatrove's pipelines for conversations: read those of a part, write its samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document

from megatron_recursive.data.chat.formats import iter_conversations
from megatron_recursive.data.chat.options import ChatOptions
from megatron_recursive.data.chat.samples import samples_of
from megatron_recursive.data.chat.supervision import load_chat_encoder
from megatron_recursive.data.steps import IndexedDatasetWriter, PartReader
from megatron_recursive.data.tokenizer import StoredTokenizer
from megatron_recursive.data.work_folder import WorkFolder

_BATCH = 64


class ConversationReader(PartReader):
    """Reads the conversations of one part of the plan."""

    name = "💬 Conversations of files"

    def __init__(self, work: WorkFolder, on_error: str, options: ChatOptions) -> None:
        super().__init__(work, "", on_error)
        self.options = options

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        record = None
        for span in self.work.read_part(rank):
            for conversation in iter_conversations(span, self.options, self._reject):
                self.report.bytes += conversation.record.size if conversation.record is not record else 0
                record = conversation.record
                yield Document("", f"{span.path}:{span.start}/{record.number}", metadata={"conversation": conversation})


class ChatWriter(IndexedDatasetWriter):
    """Renders, tokenizes and writes conversations, with which of their tokens are supervised in ``.supervised``."""

    name = "Megatron indexed dataset of conversations"
    ends = ("bin", "supervised", "idx")
    preload = ("transformers.models.auto.tokenization_auto",)  # imports torch: two seconds a worker otherwise

    def __init__(self, reader: ConversationReader, tokenizer: StoredTokenizer) -> None:
        super().__init__(reader, tokenizer, append_eod=False)
        self.options = reader.options

    def _samples(self, documents: Any) -> Iterator[list[tuple[list[int], bytes | None]]]:
        template, rust = load_chat_encoder(self.tokenizer.file.parent)
        conversations = (document.metadata["conversation"] for document in documents)
        for batch in itertools.batched(conversations, _BATCH):
            yield [*samples_of(batch, template, rust, self.options, self.reader.report, self.reader._reject)]
