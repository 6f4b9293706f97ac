"""Writes the checkpoint of this folder that an earlier Megatron-LM saves after two steps, and that model's logits.

Run it once a version, from a checkout of Megatron-LM's tag (core_v0.12.3, core_v0.15.3), in an environment with that
megatron-core, torch and this package's folder on PYTHONPATH:

    python tests/old_checkpoints/write.py MEGATRON_LM_CHECKOUT tests/old_checkpoints/0.12

Training is Megatron-LM's own pretrain_gpt.py. Patched are CUDA's surface (there is no GPU), the helpers that need a
compiler, the ids of the mock data, and for 0.12 one argument that torch has added to what it calls.
"""

import functools
import inspect
import os
import sys
from pathlib import Path

FLAGS = """
--num-layers 2 --hidden-size 16 --num-attention-heads 4 --ffn-hidden-size 24 --group-query-attention
--num-query-groups 2 --seq-length 16 --max-position-embeddings 16 --swiglu --normalization RMSNorm --norm-epsilon 1e-3
--disable-bias-linear --position-embedding-type rope --rotary-base 5000 --untie-embeddings-and-output-weights
--tokenizer-type NullTokenizer --vocab-size 61 --make-vocab-size-divisible-by 32 --mock-data --split 98,1,1
--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 3e-1 --eval-iters 0 --num-workers 0 --save-interval 2
--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion
--distributed-backend gloo --ckpt-assume-constant-structure
""".split()


def main(checkout: str, target: str) -> None:
    environment = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(environment, CUDA_DEVICE_MAX_CONNECTIONS="1")
    sys.path.insert(0, checkout)
    import torch
    from safetensors.torch import save_file

    from megatron_recursive.backends import cpu

    cpu.install()
    from megatron.core.datasets import gpt_dataset
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import initialize, training

    gpt_dataset.MockGPTLowLevelDataset.max_sequence_length = 32
    initialize._compile_dependencies = lambda: None
    if "serialization_format" not in inspect.getsource(filesystem_async):
        from torch.distributed.checkpoint.filesystem import SerializationFormat

        filesystem_async._write_item = functools.partial(
            filesystem_async._write_item, serialization_format=SerializationFormat.TORCH_SAVE
        )
    save = training.save_checkpoint

    def save_and_show(iteration, model, *args, **kwargs):
        save(iteration, model, *args, **kwargs)
        tokens = torch.arange(16)[None] * 3 % 61
        model[0].eval()
        with torch.no_grad():
            logits = model[0](tokens, torch.arange(16)[None], None)
        save_file({"tokens": tokens, "logits": logits.float().contiguous()}, Path(target) / "logits.safetensors")

    training.save_checkpoint = save_and_show
    sys.argv = ["pretrain_gpt.py", *FLAGS, "--save", target]
    script = Path(checkout) / "pretrain_gpt.py"
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})


if __name__ == "__main__":  # the save starts a process, which imports this file
    main(*sys.argv[1:])
