"""Session-wide hooks of the test suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_recursive.backends import cpu
from tests.distributed import shutdown_pool, start_ahead


def pytest_sessionstart(session: pytest.Session) -> None:
    """The whole suite needs all workers, whose imports take as long as the collection of its tests. With ``-n`` each of
    pytest's processes has its own; the one that only hands out tests needs none."""
    config = session.config
    narrowed = config.option.keyword or config.option.collectonly
    runs_tests = hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None)
    if config.args_source is config.ArgsSource.TESTPATHS and not narrowed and runs_tests:
        start_ahead()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the worker processes of :func:`tests.distributed.run_distributed`."""
    shutdown_pool()


@pytest.fixture(autouse=True)
def _devices_as_they_are() -> Iterator[None]:
    """No test installs the CPU backend in pytest's own process: later tests would see CUDA devices that are the CPU."""
    yield
    assert not cpu.is_installed(), "this test installed backends.cpu in pytest's process; give it a process of its own"
