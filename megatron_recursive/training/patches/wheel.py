"""Patch of megatron-core 0.19 (PyPI wheel): do not compile what the wheel ships compiled.

``initialize_megatron`` runs ``make`` in ``megatron/core/datasets``; the wheel has the built ``helpers_cpp`` but no
Makefile, so that the call exits the process. Where the built module imports, the call becomes a no-op.
"""

from __future__ import annotations

import importlib.util


def install() -> None:
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None
