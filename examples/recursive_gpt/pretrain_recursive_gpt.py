"""Pretrain a recursive GPT. All of Megatron's flags, and those under "recursion" in --help.

    torchrun --nproc_per_node 2 examples/recursive_gpt/pretrain_recursive_gpt.py --num-layers 4 ...
"""

from megatron_recursive.training.pretrain import main

if __name__ == "__main__":  # checkpointing spawns helper processes, which import this file
    main()
