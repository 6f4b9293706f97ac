"""Ablations: arms x learning rates x seeds through the pretraining command, at equal tokens or equal FLOPs."""
