"""The parts of gpu.py that build models themselves; each is called in a process of its own. See gpu.py."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
        "A10": 125e12, "RTX 4090": 165e12}  # bf16 FLOPs a second without sparsity, as NVIDIA states  # fmt: skip


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int
    sequence: int
    micro_batch: int
    vocabulary: int = 32000
    blocks: int = 3
    latents: int = 2

    @property
    def ffn(self) -> int:
        return -(-8 * self.hidden // 3 // 64) * 64


FULL = {"100M": Size(12, 768, 12, 1024, 8), "400M": Size(24, 1024, 16, 2048, 8), "1B": Size(20, 2048, 16, 2048, 4)}
TINY = {"tiny": Size(2, 32, 4, 32, 2, 128)}


def start(device: str) -> None:
    """One process as a world of its own. Before anything of Megatron is imported."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    if device == "cpu":
        from megatron_recursive.backends import cpu

        cpu.install(on_purpose=True)
    import torch

    if device == "cuda":
        torch.cuda.set_device(0)
    store = torch.distributed.FileStore(f"{tempfile.mkdtemp()}/store", 1)
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    prepare()


def prepare() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_recursive.pipeline import dispatch

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    dispatch.install()


class Arm:
    """One model under Megatron's DDP and distributed optimizer, with a batch; ``step`` is a whole training step."""

    def __init__(self, size: Size, knobs: dict[str, Any], *, bf16: bool = True, engine: bool = False,
                 recompute: bool = False, train: bool = True) -> None:  # fmt: skip
        import torch
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        torch.manual_seed(1)
        self.size = size
        model = self._model(knobs, bf16, engine, recompute)
        self.model, config = model.cuda(), model.config
        inner = Float16Module(config, self.model) if bf16 else self.model
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=train,
                                            overlap_grad_reduce=train, overlap_param_gather=train)  # fmt: skip
        self.wrapped = DistributedDataParallel(config, ddp, inner)
        config.finalize_model_grads_func, self.optimizer = finalize_model_grads, None
        if train:
            config.no_sync_func = self.wrapped.no_sync
            options = OptimizerConfig(optimizer="adam", lr=1e-4, bf16=bf16, params_dtype=config.params_dtype,
                                      use_distributed_optimizer=True, overlap_param_gather=True)  # fmt: skip
            self.optimizer = get_megatron_optimizer(options, [self.wrapped])
        shape = (size.micro_batch, size.sequence + 1)
        tokens = torch.randint(0, size.vocabulary, shape, generator=torch.Generator().manual_seed(2)).cuda()
        positions = torch.arange(size.sequence).expand(size.micro_batch, -1).cuda()
        mask = torch.ones(size.micro_batch, size.sequence).cuda()
        self.batch = {"input_ids": tokens[:, :-1].contiguous(), "position_ids": positions, "attention_mask": None,
                      "labels": tokens[:, 1:].contiguous(), "loss_mask": mask}  # fmt: skip

    def _model(self, knobs: dict[str, Any], bf16: bool, engine: bool, recompute: bool) -> Any:
        import torch
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        from megatron_recursive.models import compiled_fusions
        from megatron_recursive.models.layer_specs import local_block_spec
        from megatron_recursive.models.recursive_gpt_model import RecursiveGPTModel, RecursiveTransformerConfig
        from megatron_recursive.plan import RecursionConfig

        size, dtype = self.size, torch.bfloat16 if bf16 else torch.float32
        config = RecursiveTransformerConfig(
            num_layers=size.layers, hidden_size=size.hidden, num_attention_heads=size.heads, ffn_hidden_size=size.ffn,
            normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True,
            activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
            bf16=bf16, params_dtype=dtype, pipeline_dtype=dtype, use_cpu_initialization=not bf16,
            init_method_std=size.hidden**-0.5,
            bias_activation_fusion=True, bias_dropout_fusion=True, masked_softmax_fusion=False,
            gradient_accumulation_fusion=False, persist_layer_norm=engine, apply_rope_fusion=engine,
            transformer_impl="transformer_engine" if engine else "local", recompute_passes=recompute,
        )  # fmt: skip
        compiled_fusions.choose(config)
        spec = get_gpt_layer_with_transformer_engine_spec() if engine else local_block_spec(config)
        recursion = RecursionConfig(num_refinement_blocks=size.blocks, num_latent_refinements=size.latents, **knobs)
        return RecursiveGPTModel(config, spec, size.vocabulary, size.sequence, position_embedding_type="rope",
                                 share_embeddings_and_output_weights=True,
                                 recursion=recursion.resolved(embedding_init_std=size.hidden**-0.5))  # fmt: skip

    def shape(self) -> Any:
        from megatron_recursive.accounting import ModelShape

        size = self.size
        return ModelShape(num_layers=size.layers, hidden_size=size.hidden, ffn_hidden_size=size.ffn,
                          num_attention_heads=size.heads, num_query_groups=size.heads,
                          kv_channels=size.hidden // size.heads, vocab_size=size.vocabulary, seq_length=size.sequence,
                          gated_linear_unit=True, tied_embeddings=True, linear_bias=False, norm_bias=False)  # fmt: skip

    def step(self) -> float:
        """Forward, backward, reduction and optimizer; the loss."""
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        def forward_step(_: Any, model: Any) -> Any:
            return model(**self.batch), partial(loss_of, self.batch["loss_mask"])

        self.wrapped.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=None, model=[self.wrapped], num_microbatches=1,
            seq_length=self.size.sequence, micro_batch_size=self.size.micro_batch, forward_only=False,
        )  # fmt: skip
        if self.optimizer is not None:
            self.optimizer.step()
        return float(reports[0]["lm loss"])

    def close(self) -> None:
        """Give the memory back: once it has trained, Megatron's DDP outlives its last user, with 10 bytes a weight."""
        held = [*self.model.parameters(), *(p.main_param for p in self.model.parameters() if hasattr(p, "main_param"))]
        held += [tensor for buffer in self.wrapped.buffers for tensor in (buffer.grad_data, buffer.param_data)]
        self.optimizer = None
        for tensor in held:
            if tensor is not None:
                tensor.untyped_storage().resize_(0)

    def seconds(self, steps: int) -> float:
        import torch

        times = []
        for number in range(steps + 3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            self.step()
            torch.cuda.synchronize()
            if number >= 3:  # the first compile
                times.append(time.perf_counter() - begin)
        return statistics.median(times)


def loss_of(mask: Any, output: Any) -> Any:
    import torch

    objective = (getattr(output, "objective_BS", output).float() * mask).sum()
    metrics = getattr(output, "metrics", None) or {"lm loss": torch.stack([objective.detach(), mask.sum()])}
    pair = metrics["lm loss"]
    return objective, mask.sum().to(torch.int), {"lm loss": pair[0] / pair[1]}


def attention(tiny: bool) -> dict[str, Any]:
    """Which kernel torch takes for the local spec's calls, and that the slow one is never needed."""
    import torch
    from torch.nn.attention import SDPBackend

    from megatron_recursive.models.layer_specs import fused_attention

    taken = {}
    for dtype in (torch.bfloat16, torch.float32):
        for groups in (8, 2):
            for masked in (False, True):
                query, key, value = (torch.randn(2, n, 128, 64, device="cuda", dtype=dtype, requires_grad=True)
                                     for n in (8, groups, groups))  # fmt: skip
                mask = torch.ones(128, 128, dtype=torch.bool, device="cuda").tril() if masked else None
                fused_attention(query, key, value, attn_mask=mask, is_causal=not masked,
                                enable_gqa=groups != 8).sum().backward()  # fmt: skip
                fits = dict(attn_mask=mask, is_causal=not masked, enable_gqa=groups != 8)
                name = f"{str(dtype).removeprefix('torch.')}, {groups} groups, {'a mask' if masked else 'causal'}"
                taken[name] = SDPBackend(torch._fused_sdp_choice(query, key, value, **fits)).name
    return {"fused": True, "torch_would_take": taken}


def parity_child(tiny: bool, out: Path) -> None:
    """Losses and all gradients in fp32, for :func:`gpu.parity`, which compares two devices."""
    import torch

    size, found = (TINY["tiny"] if tiny else Size(4, 256, 8, 256, 4, 1024)), {}
    for name, detach in (("detached", True), ("full", False)):
        arm = Arm(size, {"detach_between_refinements": detach}, bf16=False, train=False)
        found[f"{name} loss"] = torch.tensor(arm.step())
        found |= {f"{name} {n}": p.main_grad.cpu() for n, p in arm.model.named_parameters()}
    torch.save(found, out)


def speed(tiny: bool, engine: bool = False) -> dict[str, Any]:
    """Step time, tokens a second and MFU of plain models and of recursive ones whose blocks are cut apart."""
    import torch

    from megatron_recursive.accounting import flops_per_token

    device, results = torch.cuda.get_device_name(), {}
    peak = next((rate for name, rate in PEAK.items() if name in device), None)
    matmul = matmul_rate(256 if tiny else 8192)
    for name, size in (TINY if tiny else FULL).items():
        for arm_name, knobs in (("plain", {"enable_recursive_refinement": False}),
                                ("recursive", {"detach_between_refinements": True})):  # fmt: skip
            try:
                with contextlib.closing(Arm(size, knobs, engine=engine)) as arm:
                    seconds = arm.seconds(2 if tiny else 8)
                    tokens = size.micro_batch * size.sequence
                    rate = flops_per_token(arm.shape(), arm.model.plan).total * tokens / seconds
                    results[f"{name} {arm_name}"] = {
                        "parameters": sum(p.numel() for p in arm.model.parameters()), "seconds": seconds,
                        "tokens_per_second": tokens / seconds, "flops_per_second": rate,
                        "mfu": rate / peak if peak else None, "of_matmul": rate / matmul,
                        "peak_bytes": torch.cuda.max_memory_allocated(),
                    }  # fmt: skip
            except torch.OutOfMemoryError as error:
                results[f"{name} {arm_name}"] = {"error": str(error)[:200]}
            free()
            found = {"peak_flops_per_second": peak, "matmul_flops_per_second": matmul, "models": results}
            print(f"\n{json.dumps(found)}", flush=True)
    return found


def matmul_rate(width: int) -> float:
    import torch

    a, b = (torch.randn(width, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * width**3 / min(times)


def memory(tiny: bool) -> dict[str, Any]:
    """Peak memory and time of detached, full-gradient and recomputed passes, against the accounting."""
    import torch

    from megatron_recursive.accounting import Recording, StateBytes, stage_memory

    size, results = (TINY["tiny"] if tiny else FULL["100M"]), {}
    for name, detach, recompute in (("detached", True, False), ("full", False, False), ("recomputed", False, True)):
        with contextlib.closing(Arm(size, {"detach_between_refinements": detach}, recompute=recompute)) as arm:
            recording = Recording(micro_batch=size.micro_batch, recompute_passes=recompute,
                                  splits_activation=not arm.model.config.bias_activation_fusion)  # fmt: skip
            (counted,) = stage_memory(arm.shape(), arm.model.plan, recording, StateBytes())
            arm.step()
            torch.cuda.reset_peak_memory_stats()
            seconds = arm.seconds(2)
            peak = torch.cuda.max_memory_allocated()
            results[name] = {"peak_bytes": peak, "counted_bytes": counted.total,
                             "peak_over_counted": peak / counted.total, "weights_bytes": counted.weights,
                             "seconds": seconds}  # fmt: skip
        free()
    return {"models": results}


def free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    with contextlib.suppress(AssertionError, RuntimeError):
        torch.cuda.reset_peak_memory_stats()
