"""Devices on which Megatron would not run by itself."""
