"""Session-wide hooks of the test suite."""

from __future__ import annotations

import pytest

from tests.distributed import shutdown_pool


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the worker processes of :func:`tests.distributed.run_distributed`."""
    shutdown_pool()
