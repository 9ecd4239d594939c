"""One broadcast of weights from the trainer to several engines' workers: who meets, what travels, and how it ends.

The trainer is rank 0 and sends; every worker receives the same bytes: tensors packed one behind another into buffers.
Between GPUs NCCL carries them (vllm_nccl.py), between processes on CPUs gloo; everything else is the same code.

All processes are on one host.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from async_rl.wire.endpoint import LOOPBACK

WAIT = timedelta(hours=1)
"""of gloo's own waits: those who wait have deadlines of their own"""
POLL_S = 0.0005
ALIGNED = 256
"""bytes"""
PACKED_BYTES = 256 << 20
"""of tensors that travel together; a larger tensor travels alone"""

Sent = tuple[str, str, list[int]]
"""name, dtype and shape of a tensor"""


class GroupEnded(Exception):
    """The group was aborted, or a member has gone."""


class Communicator(Protocol):
    """One process's end of a group. A broadcast may not begin before the one before is done."""

    def begin(self, buffer: Tensor) -> None:
        """Begin to send (rank 0) or to receive a buffer of bytes. Raises GroupEnded."""
        ...

    def done(self) -> bool:
        """Whether what was begun has left or arrived. Raises GroupEnded."""
        ...

    def abort(self) -> None:
        """End the group here, in any thread; whoever waits in it gets GroupEnded."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where and as whom a process joins a group. Plain numbers: the detail of a call."""

    store: int
    """port of the sender's store, over which the members meet"""
    lifeline: int
    """port to which a worker stays connected"""
    opened: int
    """port over which NCCL's number of the group is handed out"""
    rank: int
    size: int


class GlooCommunicator:
    """A `Communicator` between processes on CPUs."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = WAIT
        self._group = gloo(store, rank, size, options)
        self._work: Any = None
        self._aborted = False

    def begin(self, buffer: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._work = self._ask(lambda: self._group.broadcast([buffer], options))

    def done(self) -> bool:
        if self._aborted:
            raise GroupEnded("the group was aborted")
        if not self._work.is_completed():
            return False
        self._ask(self._work.wait)
        return True

    def abort(self) -> None:
        if not self._aborted:
            self._aborted = True
            self._group.abort()
            # Its destructor may wait for what is under way; a thread that the end of the process does not wait for
            # keeps it from being called.
            threading.Thread(target=_keep, args=(self._group,), name="ended group", daemon=True).start()

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # gloo's, for a connection that broke
            raise GroupEnded(str(error).splitlines()[0]) from None


def _keep(_group: Any) -> None:
    threading.Event().wait()


def plan_buffers(sent: Sequence[Sent], packed_bytes: int) -> list[list[tuple[Sent, int]]]:
    """Which tensors travel together, and where each begins in their buffer (bytes); the same on both sides."""
    buffers: list[list[tuple[Sent, int]]] = []
    end = packed_bytes
    for one in sent:
        size = _bytes(one)
        if not buffers or end + size > packed_bytes:
            buffers.append([])
            end = 0
        buffers[-1].append((one, end))
        end += -(-size // ALIGNED) * ALIGNED
    return buffers


def views(buffer: Tensor, planned: Sequence[tuple[Sent, int]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a buffer, by name."""
    for one, start in planned:
        name, dtype, shape = one
        part = buffer[start : start + _bytes(one)]
        yield name, part.view(getattr(torch, dtype)).view(shape)


def room_for(buffers: Sequence[Sequence[tuple[Sent, int]]]) -> int:
    """Bytes of a buffer into which each of `buffers` fits."""
    return max((planned[-1][1] + _bytes(planned[-1][0]) for planned in buffers if planned), default=0)


def used(planned: Sequence[tuple[Sent, int]]) -> int:
    """Bytes of a buffer that hold something."""
    return room_for([planned])


def _bytes(one: Sent) -> int:
    _, dtype, shape = one
    return prod(shape) * getattr(torch, dtype).itemsize


def wait_for(
    communicator: Communicator, look: Callable[[float], None] = lambda waited: None, poll_s: float = POLL_S
) -> None:
    """Return when the broadcast that was begun is done. `look`: called often with the seconds waited; may raise."""
    began = time.monotonic()
    while not communicator.done():
        look(time.monotonic() - began)
        time.sleep(poll_s)
