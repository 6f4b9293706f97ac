"""The training step that Megatron's schedules call, and the datasets that it reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, get_tokenizer, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_recursive.data.content_keyed import ContentKeyedGPTDataset
from megatron_recursive.data.same_samples import SameSamples
from megatron_recursive.errors import UserError
from megatron_recursive.losses.telemetry import masked
from megatron_recursive.models.documents import Documents
from megatron_recursive.models.recursion_core import RecursiveOutput
from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel
from megatron_recursive.plan import RecursionPlan, StepPlans
from megatron_recursive.training import data_stream
from megatron_recursive.training.chat_data import chat_datasets, is_chat
from megatron_recursive.training.distillation import check_samples, has_teacher
from megatron_recursive.training.metrics_log import SUPERVISED
from megatron_recursive.training.supervision_steps import samples_read

SPIKE_FACTOR = 10  # --check-for-spiky-loss: as Megatron's own GPT script
STRAGGLER = StragglerDetector()  # of --log-straggler, which divides by the time between its start and stop
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "document_ids")


def get_batch(data_iterator: Iterator[dict[str, Tensor]] | None) -> dict[str, Tensor | None]:
    """The next micro-batch on every tensor-parallel rank: [B, S] tensors under ``BATCH_KEYS``.

    The first pipeline stage gets tokens, the last one labels. Where documents are kept apart, every stage gets their
    ids: the loader's, or by the end-of-document tokens, each of which belongs to the document that it ends. (Megatron's
    own script tells middle stages nothing, and documents leak there.)
    """
    args = get_args()
    if not _stage_reads_data():
        return dict.fromkeys(BATCH_KEYS)
    is_last = parallel_state.is_pipeline_last_stage()
    tp_rank, group = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_group()
    source = parallel_state.get_tensor_model_parallel_src_rank()
    micro_batch = args.micro_batch_size if torch.is_grad_enabled() else args.eval_micro_batch_size
    batch: dict[str, Tensor | None] = {}
    if tp_rank == 0:
        assert data_iterator is not None
        loaded = next(data_iterator)
        if _keeps_documents(args) and "document_ids" not in loaded:
            ends_BS = (loaded["tokens"] == get_tokenizer().eod).long()
            loaded = {**loaded, "document_ids": ends_BS.cumsum(1) - ends_BS}
        for key in BATCH_KEYS:
            value = loaded.get(key)
            batch[key] = value.cuda(non_blocking=True) if value is not None else None
    ids_BS = None
    if _keeps_documents(args):
        ids_BS = batch.get("document_ids")
        if ids_BS is None:
            shape = micro_batch, args.seq_length
            ids_BS = torch.empty(shape, dtype=torch.long, device=torch.cuda.current_device())
        torch.distributed.broadcast(ids_BS, source, group=group)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=source,
        broadcast_group=group,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        # Of one stage all are told: a teacher on the last one reads tokens too.
        pipeline_model_parallel_size=1 if is_last and has_teacher(args) else args.pipeline_model_parallel_size,
        is_pipeline_first_stage=not is_last,  # a middle stage reads the same samples, and uses their ids
        is_pipeline_last_stage=is_last,
    )
    batch["document_ids"] = ids_BS
    first_answer = getattr(args, "answer_tokens", None)  # Megatron's own arguments do not have it
    if first_answer is not None:
        _hide_answers(batch, first_answer)
    return batch


def _hide_answers(batch: dict[str, Tensor | None], first: int) -> None:
    """--answer-tokens: the model reads token 0 where an answer stands, and the loss counts at answers alone."""
    tokens, labels, mask = (batch[name] for name in ("tokens", "labels", "loss_mask"))
    if tokens is not None:
        batch["tokens"] = tokens.masked_fill(tokens >= first, 0)
    if labels is not None and mask is not None:
        batch["loss_mask"] = mask * (labels >= first)


def loss_func(
    loss_mask_BS: Tensor | None, output: Tensor | RecursiveOutput
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What the schedule wants: the summed objective, the tokens that it sums over, and (sum, count) pairs to report.

    ``output`` is a RecursiveOutput, or the [B, S] losses of a model whose recursion is disabled.
    """
    assert loss_mask_BS is not None, "the last pipeline stage has the loss mask"
    mask = loss_mask_BS.float()
    if isinstance(output, RecursiveOutput):
        objective_BS, report = output.objective_BS, output.metrics
    else:
        objective_BS = output.float()
        report = {"lm loss": masked(objective_BS.detach(), mask)}
    if torch.is_grad_enabled() and is_chat(get_args()):  # their sum over the batch, by way of Megatron's mean
        of_batch = get_num_microbatches() * parallel_state.get_data_parallel_world_size()
        report[SUPERVISED] = torch.stack([mask.sum() * of_batch, torch.ones_like(mask.sum())])
    loss = (objective_BS * mask).sum()
    _check(loss)
    return loss, mask.sum().detach().to(torch.int), report


def _check(loss: Tensor) -> None:
    """NaN, infinity and spikes, as Megatron's rerun state machine handles them."""
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for is_bad, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            message = f"found {name} in local forward loss calculation"
            machine.validate_result(result=loss, rejection_func=is_bad, message=message, tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        is_spike = partial(machine.is_unexpectedly_large, threshold=SPIKE_FACTOR, context="loss")
        machine.validate_result(
            result=loss, rejection_func=is_spike, message="Spiky loss", tolerance=0.0, fatal=False
        )


def forward_step(
    data_iterator: Any, model: Any, plan: RecursionPlan | None = None
) -> tuple[Tensor | RecursiveOutput, Any]:
    """One micro-batch through the model; called by Megatron's schedules in training and evaluation.

    ``plan``: of this step, on one stage (the ring knows its own); None is the model's own.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with STRAGGLER(bdata=True):
        batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    args, inner = get_args(), model
    while hasattr(inner, "module"):  # a pass of the ring, DDP; what is inside may be Megatron's own GPT
        inner = inner.module
    iteration = getattr(args, "curr_iteration", 0)  # a run that only evaluates has none
    inner.reports_accuracy = is_chat(args)
    inner.draw = (args.seed * 0x9E3779B1 ^ iteration) & 0xFFFFFFFF
    with STRAGGLER:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=Documents.of(batch["document_ids"]),
            **({} if plan is None else {"plan": plan}),
        )
    return output, partial(loss_func, batch["loss_mask"])


def plan_of_step(plans: StepPlans, model: RecursiveGPTModel, forward_only: bool) -> RecursionPlan | None:
    """What a step runs: in training the plan of Megatron's iteration, in evaluation the model's own (None).

    A model that grows has another plan from then on.
    """
    if forward_only:
        return None
    iteration = get_args().curr_iteration
    model.plan = plans.own_plan(iteration + 1)
    return plans.plan_at(iteration)


def datasets_provider(train_valid_test_num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's GPT datasets for the three splits, built where a rank reads them."""
    args = get_args()
    train, valid, test = train_valid_test_num_samples
    period = 0 if valid is None else args.eval_iters * args.eval_global_batch_size  # what one evaluation reads
    if valid is not None:
        valid = sys.maxsize if is_chat(args) and period else period
    if period:  # an evaluation begins where the period does, also where --eval-iters was another before
        args.consumed_valid_samples -= args.consumed_valid_samples % period
    train_valid_test_num_samples = [samples_read(args, train), valid, test]
    if is_chat(args):
        datasets = chat_datasets(args, train_valid_test_num_samples) if _reads_data() else (None, None, None)
        if datasets[0] is not None and has_teacher(args):
            check_samples(args, datasets[0], train_valid_test_num_samples[0])
        return datasets
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        sequences = json.loads(Path(args.per_dataset_sequences_path).read_text(encoding="utf-8"))
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=sequences,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )
    print_rank_0("> building train, validation, and test datasets ...")
    kind = MockGPTDataset if args.mock_data else ContentKeyedGPTDataset
    builder = BlendedMegatronDatasetBuilder(kind, train_valid_test_num_samples, _reads_data, config)
    built: list[Any] = [None, None, None] if config.mock and not args.mock_data else builder.build()  # a stream alone
    if period and built[1] is not None and len(built[1]):  # a random order has epochs, another has no end
        built[1] = SameSamples(built[1], period, period if args.dataloader_type == "cyclic" else sys.maxsize)
    datasets = built[0], built[1], built[2]
    if data_stream.is_stream(args):
        return data_stream.loaders(args, config, datasets, _reads_data())
    if args.dataloader_type != "cyclic":
        _check_enough(datasets[0], train_valid_test_num_samples[0], args)
    if datasets[0] is not None and has_teacher(args):
        check_samples(args, datasets[0], train_valid_test_num_samples[0])
    print_rank_0("> finished creating datasets ...")
    return datasets


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron builds it on every rank


def _check_enough(train: Any, wanted: int | None, args: Any) -> None:
    """A blend without weights is one epoch of each of its sources, whatever the run needs; Megatron would just stop."""
    if train is not None and wanted is not None and len(train) < wanted:
        raise UserError(
            f"The training data holds {len(train)} samples of --seq-length {args.seq_length}, but the run needs "
            f"{wanted}: a list of prefixes without weights is read once, so put a weight before each prefix, or train "
            "for fewer iterations."
        )


def _reads_data() -> bool:
    return _stage_reads_data() and parallel_state.get_tensor_model_parallel_rank() == 0


def _stage_reads_data() -> bool:
    return is_first_or_last_pipeline_stage(None) or _keeps_documents(get_args())


def _keeps_documents(args: Any) -> bool:
    return args.reset_attention_mask or is_chat(args)
