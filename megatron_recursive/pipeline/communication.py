"""Who talks to whom in a ring: Megatron's communicator, and the groups that a caller names."""

from __future__ import annotations

from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection


class RingCommunicator(P2PCommunicator):
    """Megatron's, which also knows its last message: where outputs are not freed, the schedule does not wait for it."""

    last: Any = None

    def _communicate(self, **kwargs: Any) -> tuple[Any, Any, Any]:
        from_previous, from_next, requests = super()._communicate(**kwargs)
        self.last = requests.get("send_next") if requests else None  # an earlier one has been waited for by now
        return from_previous, from_next, requests

    def finish(self) -> None:
        if self.last is not None:
            self.last.wait()


def groups_of(p2p_communicator: Any, pg_collection: Any) -> ProcessGroupCollection:
    """The groups that the caller wants, or as in Megatron's schedule those of parallel state."""
    if p2p_communicator is None and pg_collection is None:
        return schedules._build_default_pg_collection()
    if isinstance(p2p_communicator, P2PCommunicator) and isinstance(pg_collection, ProcessGroupCollection):
        if p2p_communicator.pp_group is pg_collection.pp:
            return pg_collection
    raise ValueError("the ring takes a P2PCommunicator and a ProcessGroupCollection of the same pp group, or neither")
