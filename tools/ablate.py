"""The command ``megatron-recursive ablate``: arms x learning rates x seeds at equal tokens or FLOPs."""

from megatron_recursive.commands import door

if __name__ == "__main__":
    door("ablate")
