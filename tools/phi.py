"""The command ``megatron-recursive phi``: how many unique layers a loop is worth, fitted to an ablation's losses."""

from megatron_recursive.commands import door

if __name__ == "__main__":
    door("phi")
