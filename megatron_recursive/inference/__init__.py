"""Generation: from exported folders and from Megatron checkpoints directly."""
