"""``--data-stream DIR``: training samples straight from Parquet, through Megatron's external data loader.

Sample n is S + 1 tokens of one endless sequence, from token ``token + (n - sample) * S`` on. The checkpoint holds this
position, which is the same for all ranks, whatever their number: each one that reads goes through the whole sequence,
and takes the samples that Megatron's sampler gives it. So a rank must tokenize as fast as the whole job trains.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler, build_pretraining_data_loader
from torch.utils.data import default_collate

from megatron_recursive.data.megatron_flags import TOKENIZER_TYPES
from megatron_recursive.data.stream import TokenStream
from megatron_recursive.data.tokenizer import StoredTokenizer, TokenizerChoice, store_tokenizer
from megatron_recursive.errors import UserError
from megatron_recursive.plan.knobs import flag_of
from megatron_recursive.training import console

EXCLUDED = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path", "mock_data", "distill_from",
            "chat_data", "train_epochs", "phase_transition_iterations")  # fmt: skip


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data that are tokenized while training")
    group.add_argument(
        "--data-stream", metavar="DIR",
        help="Train on the text of a folder of .parquet (of mix, say), epoch after epoch, without preprocessing; "
        "--valid-data-path and --test-data-path stay.",
    )  # fmt: skip
    group.add_argument(
        "--data-stream-key", default="text", metavar="COLUMN", help="Column of the text (default: text)."
    )


def is_stream(args: argparse.Namespace) -> bool:
    return getattr(args, "data_stream", None) is not None  # Megatron's own arguments do not have it


def refuse_stream(args: argparse.Namespace) -> None:
    """What a stream cannot go with; otherwise the loader is external from here on."""
    args.data_stream_position = None
    if not is_stream(args):
        return
    for name in EXCLUDED:
        if getattr(args, name, None):
            raise UserError(f"--data-stream excludes {flag_of(name)}; leave out either.")
    if args.valid_data_path is None and (args.eval_iters or args.full_validation):
        raise UserError("--data-stream holds no data apart for evaluation; give --valid-data-path PREFIX, or "
                        "--eval-iters 0 without --full-validation.")  # fmt: skip
    if args.tokenizer_type not in TOKENIZER_TYPES:
        raise UserError(f"--data-stream cannot tokenize with --tokenizer-type {args.tokenizer_type}; give one of "
                        f"{', '.join(TOKENIZER_TYPES)}.")  # fmt: skip
    args.dataloader_type = "external"


class StreamSamples(GPTDataset):
    """The samples of a stream from sample ``first`` and token ``token`` on, as Megatron's dataset makes them."""

    def __init__(self, stream: TokenStream, first: int, token: int, config: GPTDatasetConfig) -> None:
        self.stream, self.first, self.token = stream, first, token
        super().__init__(None, stream.folder, None, None, Split.train, config)

    def token_of(self, number: int) -> int:
        return self.token + (number - self.first) * int(self.config.sequence_length)

    def position(self, number: int) -> dict[str, Any]:
        """Where a sample is, for the checkpoint: :func:`samples_of_run` goes on from it."""
        token = self.token_of(number)
        return {"stream": self.stream.identity, "sample": number, "token": token, "mark": [*self.stream.mark(token)],
                "seq_length": self.config.sequence_length}  # fmt: skip

    def _build_document_sample_shuffle_indices(self) -> tuple[None, None, None]:
        return None, None, None

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, None, list[int]]:
        return self.stream.read(self.token_of(idx), self.config.sequence_length + 1), None, []


def stored_tokenizer(args: argparse.Namespace, folder: Path) -> StoredTokenizer:
    """The run's tokenizer, in a file in a folder."""
    choice = TokenizerChoice(args.tokenizer_model, special_tokens=not args.tokenizer_hf_no_include_special_tokens)
    if args.tokenizer_type == "GPT2BPETokenizer":
        choice = TokenizerChoice(None, args.vocab_file, args.merge_file)
    return store_tokenizer(choice, folder)


def samples_of_run(args: argparse.Namespace, config: GPTDatasetConfig) -> StreamSamples:
    """Those of the run's stream, from the checkpoint's position on; another stream is read from its beginning."""
    with tempfile.TemporaryDirectory() as folder:
        stored = stored_tokenizer(args, Path(folder))
        if stored.eod is None:
            raise UserError(f"--data-stream: the tokenizer {stored.name} has no end-of-document token; set one.")
        stream = TokenStream(args.data_stream, stored, args.data_stream_key, args.seed)
    first, token, position = args.consumed_train_samples, 0, args.data_stream_position
    before = -1  # the token that the first sample begins with; an earlier one than the last that was read
    if position is not None and position["stream"] == stream.identity:  # where carried steps start a batch again
        before = position["token"] + (first - position["sample"]) * position["seq_length"]
    if before >= 0:
        token = before
        stream.go_on_from(tuple(position["mark"]))
    elif first and args.rank == 0:
        console.say(f"--data-stream {args.data_stream} is read from its beginning: the checkpoint is of other data")
    return StreamSamples(stream, first, token, config)


def batches_of_run(args: argparse.Namespace, config: GPTDatasetConfig) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches; a thread tokenizes ahead, and the arguments hold the position of what was taken."""
    samples = samples_of_run(args, config)
    sampler = MegatronPretrainingSampler(
        sys.maxsize, args.consumed_train_samples, args.micro_batch_size, parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )  # fmt: skip
    made = ((default_collate([samples[n] for n in numbers]), samples.position(numbers[-1])) for numbers in sampler)
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, made) for _ in range(1 + 2 * args.num_workers))
        while True:
            batch, args.data_stream_position = coming.popleft().result()
            coming.append(thread.submit(next, made))
            yield batch


def loaders(
    args: argparse.Namespace, config: GPTDatasetConfig, datasets: Sequence[Any], reads: bool
) -> tuple[Any, ...]:  # fmt: skip
    """For Megatron's external loader: the stream, and loaders of the datasets for evaluation, where a rank reads."""
    _, valid, test = datasets
    args.dataloader_type = "single"
    consumed = 0 if args.skip_train or args.full_validation else args.consumed_valid_samples
    made = [build_pretraining_data_loader(valid, consumed), build_pretraining_data_loader(test, 0)]
    args.dataloader_type = "external"
    held_out = [loader and iter(loader) for loader in made]
    if args.full_validation:  # Megatron asks for its length, and goes round in it
        held_out[0] = made[0]
    return (batches_of_run(args, config) if reads and not args.skip_train else None), *held_out


def share_position(args: argparse.Namespace) -> None:
    """Before a save: ranks that read nothing, or read further, take rank 0's word, as all that a checkpoint holds."""
    said = [args.data_stream_position]
    torch.distributed.broadcast_object_list(said, src=0)
    (args.data_stream_position,) = said
