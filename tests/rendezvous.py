"""Point-to-point messages that wait as NCCL's do, over gloo, which buffers what nobody receives.

NCCL has a communicator and a stream for each pair of ranks in a group, made at their first message. So here:

* The first message of a pair in a group is a meeting: neither rank goes on before the other has come to it.
* Messages of a pair in a group, in both directions, run one after another in the order in which they were issued.
* A send is done, and its sender goes on, only when the matching receive is at the head of its queue. (NCCL returns, but
  its kernel occupies the device, and ``CUDA_DEVICE_MAX_CONNECTIONS=1`` queues the rest behind it.)

What hangs under NCCL hangs here, and is told by rank, peer and group after ``patience`` seconds.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

DATA, POSTED, MEETING = 0, 1, 2  # tags


@contextlib.contextmanager
def rendezvous_messages(patience: float) -> Iterator[None]:
    """Send and receive in this way until the end of the block, in a process whose process group is there."""
    import torch.distributed as dist

    pairs: dict[tuple[str, int], _Pair] = {}
    modules: list[Any] = [dist, dist.distributed_c10d]
    real = {name: getattr(dist, name) for name in ("isend", "irecv", "send", "recv", "batch_isend_irecv")}

    def message(sends: bool, tensor: Any, peer: int, group: Any) -> _Message:
        group = group or dist.group.WORLD
        key = (group.group_name, peer)
        if key not in pairs:
            pairs[key] = _Pair(real["isend"], real["irecv"], peer, group, patience)
        return pairs[key].message(sends, tensor)

    def isend(tensor: Any, dst: int, group: Any = None) -> _Message:
        sent = message(True, tensor, dst, group)
        sent.wait()
        return sent

    def irecv(tensor: Any, src: int, group: Any = None) -> _Message:
        return message(False, tensor, src, group)

    def unknown(*_: Any, **__: Any) -> None:
        raise NotImplementedError("messages in batches have no rendezvous here")

    fakes = {"isend": isend, "irecv": irecv, "send": isend, "batch_isend_irecv": unknown,
             "recv": lambda tensor, src, group=None: irecv(tensor, src, group).wait()}  # fmt: skip
    for module in modules:
        for name, fake in fakes.items():
            setattr(module, name, fake)
    try:
        yield
    finally:
        for module in modules:
            for name, function in real.items():
                setattr(module, name, function)
        for pair in pairs.values():
            pair.messages.put(None)


@dataclass
class _Message:
    """What isend and irecv return."""

    sends: bool
    tensor: Any
    what: str
    patience: float
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def wait(self, *_: Any) -> bool:
        if not self.done.wait(self.patience):
            raise AssertionError(f"{self.what} found no partner within {self.patience:g} s")
        if self.error is not None:
            raise self.error
        return True

    def is_completed(self) -> bool:
        return self.done.is_set()


class _Pair:
    """This rank's queue of messages with one peer in one group, worked off by a thread."""

    def __init__(self, isend: Any, irecv: Any, peer: int, group: Any, patience: float) -> None:
        import torch

        self.isend, self.irecv, self.peer, self.group, self.patience = isend, irecv, peer, group, patience
        self.messages: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self.count, self.token = 0, torch.zeros(1)
        threading.Thread(target=self._work, daemon=True).start()
        self._enqueue(None, "the first message").wait()

    def message(self, sends: bool, tensor: Any) -> _Message:
        self.count += 1
        return self._enqueue(sends, f"message {self.count}, a {'send' if sends else 'receive'},", tensor)

    def _enqueue(self, sends: bool | None, what: str, tensor: Any = None) -> _Message:
        import torch.distributed as dist

        what = f"rank {dist.get_rank()}: {what} with rank {self.peer} in group {self.group.group_name}"
        message = _Message(bool(sends), None if tensor is None else tensor.detach(), what, self.patience)
        self.messages.put(message)
        return message

    def _work(self) -> None:
        while (message := self.messages.get()) is not None:
            try:
                if message.tensor is None:
                    arrived = self.isend(self.token, self.peer, self.group, MEETING)
                    self.irecv(self.token.clone(), self.peer, self.group, MEETING).wait()
                    arrived.wait()
                elif message.sends:
                    self.irecv(self.token.clone(), self.peer, self.group, POSTED).wait()
                    self.isend(message.tensor, self.peer, self.group, DATA).wait()
                else:
                    self.isend(self.token, self.peer, self.group, POSTED).wait()
                    self.irecv(message.tensor, self.peer, self.group, DATA).wait()
            except BaseException as error:  # told by whoever waits
                message.error = error
            message.done.set()
