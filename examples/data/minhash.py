"""Documents that are nearly the same as another one are left out, by datatrove's MinHash over the whole input.

    megatron-recursive preprocess --pipeline examples.data.minhash:without_duplicates ...

Signatures, buckets and clusters are made by three pipelines before the tokenizing begins; its own step then drops all
documents of a cluster but one. Each of the three goes on from what an interrupted run has done. The signatures read the
input once more; the clusters are made by one process, which holds the pairs of duplicates in memory.
"""

from __future__ import annotations

import re

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from megatron_recursive.data.insertion import Surroundings


class Words(WordTokenizer):
    """Runs of letters and digits; datatrove's own splitters of languages need further packages."""

    def word_tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def without_duplicates(around: Surroundings) -> list[PipelineStep]:
    """The step that drops near-duplicates: shingles of 5 words, 14 buckets of 8 hashes (similar by about 0.7)."""
    # datatrove 0.10 gives its default hash, xxhash, text, which xxhash 4 does not take.
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    signatures, buckets, removed = (str(around.folder / name) for name in ("signatures", "buckets", "removed"))
    stages = [
        ([around.reader, MinhashDedupSignature(signatures, config, language=Words())], around.parts),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ([MinhashDedupCluster(buckets, removed, config=config)], 1),
    ]
    for number, (pipeline, tasks) in enumerate(stages):
        logs = str(around.folder / f"logs{number}")
        workers = min(around.workers, tasks)
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=logs).run()
    return [MinhashDedupFilter(removed)]
