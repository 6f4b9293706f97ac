"""The training program of a rank: ``torchrun --nproc_per_node 2 -m megatron_recursive.pretrain FLAGS``."""

from megatron_recursive.training.pretrain import main

if __name__ == "__main__":  # checkpointing spawns helper processes, which import this file
    main()
