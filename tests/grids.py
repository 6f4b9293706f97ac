"""Which cases of a grid a person waits for, and which of them this session runs.

A quick case covers its kind; another case of that kind is marked ``grid``: it runs in CI, and in ``make test`` on
request (``MARKERS="not gpu"``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def grid(cases: Iterable[Any], quick: Callable[[Any], bool] | Iterable[Any]) -> list[Any]:
    """Cases for ``parametrize``: those that are not ``quick`` (of these, or as this function says) are marked."""
    is_quick = quick if callable(quick) else list(quick).__contains__
    return [case if is_quick(case) else _marked(case) for case in cases]


def _marked(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.grid)


def chosen(request: pytest.FixtureRequest, *names: str) -> list[tuple[Any, ...]]:
    """The values of these parameters in the tests that this session runs of the requesting module, each once.

    Cases of one layout share a job of ``run_distributed``, since process groups take time to make; with this a job
    trains what is looked at: all cases in CI, one under ``pytest -k``.
    """
    calls = [item.callspec.params for item in request.session.items
             if item.module is request.module and hasattr(item, "callspec")]  # fmt: skip
    return list(dict.fromkeys(tuple(call[name] for name in names) for call in calls if set(names) <= set(call)))
