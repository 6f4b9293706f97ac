"""Training through ``megatron.training.pretrain``. The only folder that imports megatron.training."""
