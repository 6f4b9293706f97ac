"""The command ``megatron-recursive health``: how states move, what the heads say of them, and whether they are used."""

from megatron_recursive.commands import door

if __name__ == "__main__":
    door("health")
