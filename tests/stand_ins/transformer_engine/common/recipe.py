class DelayedScaling:
    """Subclassed by Megatron at import."""
