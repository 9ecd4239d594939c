"""One broadcast of each version to all generators, in place of a transfer to each in turn (`weights.broadcast`).

The trainer and all workers of the generators that take part are one group (communicator.py). Each generator still has
a link of its own, with its calls, its deadline and its watched process (link.py); the thread of the link that asks
first leads a round: it waits for the others, forms the group anew where other generators take part than last time, and
sends.

Who waits for whom: a round waits for the generators that took part in the last one, for GATHER_S at most, and while it
waits everybody generates; one that did not come is not waited for again before it is back. One that is frozen does not
answer that it is there, so it never takes part. One that dies or freezes on the way ends the group: at once, or after
STALL_S without progress; the others, which hold parts of a version and do not generate, get it again in a group without
that one.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from async_rl.weights.communicator import (
    PACKED_BYTES,
    Communicator,
    GroupEnded,
    Meeting,
    Sent,
    plan_buffers,
    room_for,
    used,
    views,
    wait_for,
)
from async_rl.weights.link import Control, LinkLost, Staged, TransferEnded
from async_rl.weights.receiver import connect, open_store
from async_rl.wire import messages as msg
from async_rl.wire.endpoint import LOOPBACK, free_port

GATHER_S = 2.0
"""longest wait of a round for generators that took part in the last one"""
FIRST_S = 1.0
"""a round with one that never had weights waits so long after it, since others may start with it"""
STALL_S = 15.0
"""without progress for so long, a broadcast is given up"""
OPEN_S = 30.0
"""longest time for opening a group, the meeting included"""
ANSWER_S = 5.0
"""longest wait for the answers of members whose group was ended"""
TRIES = 3
"""of a round in which nobody can be said to have failed"""


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """The link to one generator: a `WeightLink`."""

    broadcast: Broadcast
    name: str
    control: Control
    workers: int
    given: int = -1
    """newest version sent to it"""
    missed: bool = False
    """it did not come to the last round that waited for it"""
    lost: bool = False

    def offer(self) -> None:
        self.broadcast.enter(self)

    def send(self) -> None:
        self.broadcast.send(self)

    def close(self) -> None:
        self.broadcast.leave(self)


@dataclass(slots=True, kw_only=True, eq=False)
class _Round:
    """One version on its way to those who asked for it."""

    version: int
    members: list[Member] = field(default_factory=list)
    started: set[Member] = field(default_factory=set)
    """they do not generate"""
    finished: set[Member] = field(default_factory=set)
    """they hold it, and generate again"""
    failed: dict[Member, str] = field(default_factory=dict)
    until: float = 0.0
    """monotonic time until which it waits for generators that may be starting beside one that is new"""
    done: bool = False


@dataclass(slots=True, kw_only=True)
class _Group:
    """The trainer's end."""

    members: tuple[Member, ...]
    communicator: Communicator
    lifeline: socket.socket
    store: Any
    """kept as long as members may ask it"""

    def end(self) -> None:
        """In any thread, more than once."""
        self.lifeline.close()
        self.communicator.abort()


class Broadcast:
    """All members, and the group that they form with the trainer."""

    def __init__(self, staged: Staged, *, packed_bytes: int = PACKED_BYTES) -> None:
        self._staged, self._packed_bytes = staged, packed_bytes
        self._members: list[Member] = []
        self._rounds: dict[int, _Round] = {}
        """that gather, by version"""
        self._changed = threading.Condition()
        self._sends = threading.Lock()
        """one round at a time has a group, and a buffer"""
        self._group: _Group | None = None

    def member(self, ask: msg.AskLink, control: Control) -> Member:
        return Member(broadcast=self, name=ask.name, control=control, workers=ask.workers)

    def enter(self, member: Member) -> None:
        with self._changed:
            self._members.append(member)

    def leave(self, member: Member) -> None:
        """It has ended, or is given up: what the group sends is given up, too."""
        with self._changed:
            member.lost = True
            if member in self._members:
                self._members.remove(member)
            self._changed.notify_all()
        group = self._group
        if group is not None and member in group.members:
            group.end()

    def send(self, member: Member) -> None:
        """Return when the member's generator holds the version that is staged. Raises LinkLost."""
        with self._changed:
            version = member.control.version
            mine = self._rounds.setdefault(version, _Round(version=version))
            mine.members.append(member)
            if member.given < 0:
                mine.until = time.monotonic() + FIRST_S
            member.missed = False
            self._changed.notify_all()
            leads = len(mine.members) == 1
            if leads:
                self._gather(mine)
            else:
                self._changed.wait_for(lambda: mine.done)  # the one that leads has deadlines
        if leads:
            try:
                with self._sends, _on(self._staged.device):
                    self._carry(mine)
            except Exception as error:
                for other in mine.members:
                    mine.failed.setdefault(other, f"the broadcast failed: {type(error).__name__}: {error}")
            finally:
                with self._changed:
                    mine.done = True
                    self._changed.notify_all()
        if member in mine.failed:
            raise LinkLost(mine.failed[member])
        member.given = version

    def _gather(self, mine: _Round) -> None:
        """Wait for those who lack this version, and close the round."""

        def awaited() -> list[Member]:
            return [m for m in self._members if m.given < mine.version and not m.missed and m not in mine.members]

        end = time.monotonic() + GATHER_S
        while (now := time.monotonic()) < end and (awaited() or now < mine.until):
            self._changed.wait((end if awaited() else min(end, mine.until)) - now)
        for member in awaited():
            member.missed = True
        del self._rounds[mine.version]

    def _carry(self, mine: _Round) -> None:
        """Send a round's version to its members, again to those who got it in part and have not failed."""
        tries = 0
        while there := [m for m in mine.members if m not in mine.failed and m not in mine.finished]:
            before = len(mine.failed) + len(mine.finished)
            mine.failed |= self._attempt(there, mine)
            tries += len(mine.failed) + len(mine.finished) == before
            if tries == TRIES:
                mine.failed |= dict.fromkeys(there, f"{TRIES} broadcasts ended on the way, and none of them says why")

    def _attempt(self, there: Sequence[Member], mine: _Round) -> dict[Member, str]:
        """Those who failed, and why."""
        if gone := _gone(there):
            return gone
        group = self._group
        if group is None or set(group.members) != set(there):
            self._end_group()
            group, failed = self._form_group(there)
            if group is None or failed:
                return failed
        fresh = [m for m in there if m not in mine.started]
        if failed := _errors({m: _Call(m.control.start_weight_update) for m in fresh}, STALL_S):
            return failed
        mine.started.update(fresh)
        sent: list[Sent] = [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in self._staged.named_parameters()
        ]
        update = {"broadcast": sent, "packed_bytes": self._packed_bytes}
        calls = {m: _Call(partial(_update, m.control, update)) for m in there}
        with suppress(GroupEnded):
            self._send_all(sent, group, calls)
            _errors(calls, STALL_S)  # one that has gone may have been to hand something on to others
        if not all(call.succeeded for call in calls.values()):
            self._end_group()
        gone = _gone(there)
        failed = gone | _errors({m: call for m, call in calls.items() if m not in gone}, ANSWER_S)
        mine.finished.update(m for m, call in calls.items() if call.succeeded)
        return failed

    def _send_all(self, sent: Sequence[Sent], group: _Group, calls: dict[Member, _Call]) -> None:
        """Raises GroupEnded when it does not get on."""
        tensors = dict(self._staged.named_parameters())
        buffers = plan_buffers(sent, self._packed_bytes)
        room = torch.empty(room_for(buffers), dtype=torch.uint8, device=self._staged.device)

        def look(waited: float) -> None:
            if waited > STALL_S:
                raise GroupEnded(f"nothing was taken for {STALL_S:g} s")
            if any(call.came_to_nothing for call in calls.values()):
                raise GroupEnded("a member could not receive")

        for planned in buffers:
            for name, place in views(room, planned):
                place.copy_(tensors[name], non_blocking=True)
            group.communicator.begin(room[: used(planned)])
            wait_for(group.communicator, look)
            for member in group.members:
                member.control.progressed()

    def _form_group(self, there: Sequence[Member]) -> tuple[_Group | None, dict[Member, str]]:
        """Open a group with these members. None when not all of them came; of some, perhaps, nothing was heard."""
        size = 1 + sum(member.workers for member in there)
        store = open_store(0, here=True)
        lifeline = socket.create_server((LOOPBACK, 0), backlog=size)
        ports = {"store": int(store.port), "lifeline": int(lifeline.getsockname()[1]), "opened": free_port()}
        calls, rank = {}, 1
        for member in there:
            meeting = asdict(Meeting(**ports, rank=rank, size=size))
            calls[member] = _Call(partial(member.control.init_weight_transfer_engine, meeting))
            rank += member.workers
        opened: list[Communicator] = []
        ours = _Call(lambda: opened.append(connect(self._staged.device, store, Meeting(**ports, rank=0, size=size))))
        ours.wait(OPEN_S)
        failed = _errors(calls, ANSWER_S)
        if opened and not failed and not any(call.again for call in calls.values()):
            group = _Group(members=tuple(there), communicator=opened[0], lifeline=lifeline, store=store)
            with self._changed:
                self._group = group
            return group, {}
        lifeline.close()
        for communicator in opened:
            communicator.abort()
        return None, failed

    def _end_group(self) -> None:
        with self._changed:
            group, self._group = self._group, None
        if group is not None:
            group.end()


class _Call:
    """A call to a member, in a thread, since all make theirs at once."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._done = threading.Event()
        self._error = ""
        self.again = False
        """it came to nothing, and may be made again"""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._call()
        except TransferEnded:
            self.again = True
        except Exception as error:  # the boundary of this thread
            self._error = str(error) or type(error).__name__
        self._done.set()

    @property
    def succeeded(self) -> bool:
        return self._done.is_set() and not self._error and not self.again

    @property
    def came_to_nothing(self) -> bool:
        return self._done.is_set() and (bool(self._error) or self.again)

    def wait(self, seconds: float) -> str:
        """Its error, when it has returned; after `seconds`, that it has not."""
        return self._error if self._done.wait(max(0.0, seconds)) else "no answer in time"


def _update(control: Control, update: dict[str, Any]) -> None:
    """A member goes on as soon as it has everything, whatever the others do."""
    control.update_weights(update)
    control.finish_weight_update()


def _errors(calls: dict[Member, _Call], seconds: float) -> dict[Member, str]:
    """Why a call failed, or that it did not return within `seconds`, by member; those that succeeded are left out."""
    end = time.monotonic() + seconds
    found = {member: call.wait(end - time.monotonic()) for member, call in calls.items()}
    return {member: f"{member.name}: {error}" for member, error in found.items() if error}


def _gone(members: Sequence[Member]) -> dict[Member, str]:
    return {member: f"{member.name} has gone" for member in members if member.lost}


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """In the block, this thread works on a stream of its own. Not run on a GPU yet."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
