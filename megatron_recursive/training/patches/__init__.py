"""Every patch of Megatron's training, one module each that says what, why and for which version (guide, section 10)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def wrap(module: Any, name: str, around: Callable[[Callable[[], Any], dict[str, Any]], Any]) -> None:
    """Put ``around(call, given)`` in the place of a module's function.

    ``given`` holds the arguments by name, those left out excepted; ``call()`` passes them on as ``given`` then has
    them. What an earlier run in this process put there is dropped.
    """
    original = inspect.unwrap(getattr(module, name))
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        return around(lambda: original(*bound.args, **bound.kwargs), bound.arguments)

    setattr(module, name, wrapper)
