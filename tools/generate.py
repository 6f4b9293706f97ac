"""Generate text with an exported model, any causal model of transformers, or a Megatron checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from megatron_recursive.errors import report_user_errors


@report_user_errors
def main() -> None:
    warnings.filterwarnings("ignore", module="megatron|torch|transformers")
    logging.getLogger().setLevel(logging.ERROR)  # Megatron and torch tell of every choice that they make
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    from megatron_recursive.inference import command

    parser = argparse.ArgumentParser(description=__doc__)
    command.add_arguments(parser)
    try:
        command.run(parser.parse_args())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
