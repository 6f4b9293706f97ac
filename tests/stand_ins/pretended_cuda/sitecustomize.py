"""With MEGATRON_RECURSIVE_PRETEND_CUDA=1, every Python process that has this folder in PYTHONPATH has a pretended GPU.

Python imports it at its start, so that children are pretended too. The environment's own sitecustomize, which this one
hides, is run behind it. ``pretended_cuda.py`` says what the device is.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder


def run_the_hidden_one() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("MEGATRON_RECURSIVE_PRETEND_CUDA") == "1":
    import pretended_cuda

    pretended_cuda.install()
run_the_hidden_one()
