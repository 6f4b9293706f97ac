"""Optimizers beside Megatron's own, and which of a recursive model's weights an optimizer treats apart."""
