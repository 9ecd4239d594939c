"""How a process joins the group of a broadcast, and a worker's end of it (communicator.py says what a group is).

Each worker has a connection to the sender for as long as the group lives. When it ends, because the sender closed it or
died, a thread of the worker aborts the worker's end: nothing else could end the wait in a collective call whose sender
is gone.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from async_rl.weights.communicator import (
    Communicator,
    GlooCommunicator,
    GroupEnded,
    Meeting,
    Sent,
    plan_buffers,
    room_for,
    used,
    views,
    wait_for,
)
from async_rl.wire.endpoint import LOOPBACK

MEET_S = 10.0
"""longest wait for the others before a group is opened"""


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
