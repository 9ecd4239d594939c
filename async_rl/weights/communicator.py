"""One broadcast of weights from the trainer to several engines' workers: who meets, what travels, and how it ends.

The trainer is rank 0 and sends; every worker receives the same bytes: tensors packed one behind another into buffers.
Between GPUs NCCL carries them (vllm_nccl.py), between processes on CPUs gloo; everything else is the same code.

All processes are on one host. Each worker has a connection to the sender for as long as the group lives. When it ends,
because the sender closed it or died, a thread of the worker aborts the worker's end: nothing else could end the wait
in a collective call whose sender is gone.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from async_rl.wire.endpoint import LOOPBACK

MEET_S = 10.0
"""longest wait for the others before a group is opened"""
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


def connect(device: torch.device, store: dist.Store, meeting: Meeting) -> Communicator:
    """Meet the others at the store, and open this process's end of the group. Raises GroupEnded when one of them does
    not come within MEET_S."""
    try:
        store.set(f"here {meeting.rank}", "")
        store.wait([f"here {rank}" for rank in range(meeting.size)], timedelta(seconds=MEET_S))
        if device.type == "cuda":
            from async_rl.weights.vllm_nccl import NcclCommunicator

            return NcclCommunicator(device, meeting)
        return GlooCommunicator(dist.PrefixStore("gloo", store), meeting.rank, meeting.size)
    except RuntimeError as error:  # of the store or gloo
        raise GroupEnded(f"the others did not come: {str(error).splitlines()[0]}") from None


def open_store(port: int, *, here: bool) -> dist.TCPStore:
    """The store over which the members of a group meet; `here`: this process holds it (port 0: a free one)."""
    wait = timedelta(seconds=MEET_S)
    return dist.TCPStore(LOOPBACK, port, None, here, timeout=wait, wait_for_workers=False)


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


class Receiver:
    """A worker's end of its group, of which it has one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._communicator: Communicator | None = None

    def join(self, meeting: Meeting) -> bool:
        """Leave the group before, and join another one. False when not all of its members came."""
        self.leave()
        try:
            lifeline = socket.create_connection((LOOPBACK, meeting.lifeline), timeout=MEET_S)
        except OSError:  # given up before this call
            return False
        try:
            communicator = connect(self._device, open_store(meeting.store, here=False), meeting)
        except (GroupEnded, RuntimeError):
            lifeline.close()
            return False
        lifeline.settimeout(None)
        threading.Thread(target=_abort_at_end, args=(lifeline, communicator), name="lifeline", daemon=True).start()
        self._communicator = communicator
        return True

    def receive(
        self, sent: Sequence[Sent], load: Callable[[list[tuple[str, Tensor]]], object], *, packed_bytes: int
    ) -> bool:
        """Receive tensors and give them to `load`, some at a time; they are overwritten afterwards. False when the
        group ended on the way: some may have been loaded then, and what was loaded may be anything.

        Args:
            sent, packed_bytes: as the sender plans its buffers.
        """
        communicator = self._communicator
        if communicator is None:
            return False
        buffers = plan_buffers(sent, packed_bytes)
        room = torch.empty(room_for(buffers), dtype=torch.uint8, device=self._device)
        try:
            for planned in buffers:
                communicator.begin(room[: used(planned)])
                wait_for(communicator)
                load(list(views(room, planned)))
        except GroupEnded:
            self.leave()
            return False
        return True

    def leave(self) -> None:
        if self._communicator is not None:
            self._communicator.abort()
            self._communicator = None


def _abort_at_end(lifeline: socket.socket, communicator: Communicator) -> None:
    """Wait until the sender ends the group, or dies."""
    with closing(lifeline), suppress(OSError):
        while lifeline.recv(1):
            pass
    communicator.abort()
