"""``python -m megatron_recursive``: the console script, where it is not installed."""

from megatron_recursive.commands import main

if __name__ == "__main__":
    main()
