class CudaRNGStatesTracker:
    """Subclassed by Megatron at import; used under --te-rng-tracker alone."""


def activation_recompute_forward(*args: object, **kwargs: object) -> None:
    """Imported by Megatron's checkpointing for FP8."""
    raise NotImplementedError
