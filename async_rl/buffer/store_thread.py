"""The store in a thread beside the rule (`StoreThread`): while one round is written, the next ones are decided.

Rounds are carried out in their order, several at once where they wait, and nothing is answered before it is committed.
What was decided and not committed when the process dies was told to nobody. SQLite gives Python's lock back while it
works, so this takes a processor of its own; a round that is small is carried out at once by the thread that has it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from async_rl.buffer import effects as do
from async_rl.tidying import share_heap
from async_rl.trajectory.codec import Blob
from async_rl.wire.frames import encode
from async_rl.wire.messages import Message

SMALL_BYTES = 512 << 10
"""of trajectories in a round that no thread is woken for: that takes longer than to store them"""
ROUNDS_AT_ONCE = 64
"""that one commit takes"""
STUCK_S = 1.0
"""a round that waits so long shows that the disk is held up"""
_SWITCH_S = 0.0002
"""after so long a thread that waits for Python's lock is given it; Python's own 5 ms are many statements of SQLite"""


class Sender(Protocol):
    """Who takes answers."""

    def send(self, peer: bytes, message: Message) -> bool: ...


class CarryOut(Protocol):
    """Writes and commits effects, and then gives their answers to `sender`."""

    def __call__(self, effects: Sequence[do.Effect], sender: Sender) -> None: ...


@dataclass(slots=True)
class Outbox:
    """Answers as frames, in their order."""

    frames: deque[tuple[bytes, Message, list[Blob]]] = field(default_factory=deque)

    def send(self, peer: bytes, message: Message) -> bool:
        self.frames.append((peer, message, encode(message)))
        return True


@dataclass(slots=True)
class _Round:
    effects: Sequence[do.Effect]
    num_bytes: int
    since: float


class StoreThread:
    """Carries rounds of effects out. One thread calls all that is public here: that of the socket."""

    def __init__(self, carry_out: CarryOut) -> None:
        self._carry_out = carry_out
        self.outbox = Outbox()
        self._rounds: deque[_Round] = deque()
        """those that are not committed, also while they are carried out"""
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._thread: threading.Thread | None = None
        self.waiting_bytes = 0
        """of trajectories in the rounds that are not committed"""

    def fileno(self) -> int:
        """Readable when there is something in the outbox that was not there before, or an error."""
        return self._read

    def put(self, effects: Sequence[do.Effect]) -> None:
        """Carry these out, behind those before. Raises what an earlier round failed with."""
        self._raise()
        if not effects:
            return
        size = sum(map(_bytes_of, effects))
        if not self._rounds and size < SMALL_BYTES and not any(isinstance(effect, do.SendBatch) for effect in effects):
            self._carry_out(effects, self.outbox)
            return
        self._start()
        with self._changed:
            self._rounds.append(_Round(effects, size, time.monotonic()))
            self.waiting_bytes += size
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until a round is done, `seconds` at most. Raises what a round failed with."""
        with self._changed:
            if self._rounds and self._error is None:
                self._changed.wait(seconds)
        self._raise()

    def finish(self) -> None:
        """Wait until all rounds are done. Raises what a round failed with."""
        while self._rounds:
            self.wait(STUCK_S)
        self._raise()

    @property
    def stuck(self) -> bool:
        """Whether a round waits for too long."""
        try:
            return time.monotonic() - self._rounds[0].since > STUCK_S
        except IndexError:
            return False

    def answers(self) -> Iterator[tuple[bytes, Message, list[Blob]]]:
        """(peer, message, its frames) of what has been answered since the last call."""
        with suppress(BlockingIOError):
            os.read(self._read, 4096)
        while self.outbox.frames:
            yield self.outbox.frames.popleft()

    def close(self) -> None:
        """End the thread behind the round that it has in hand. What waits is dropped: nobody was told of it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def __enter__(self) -> StoreThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._thread is None:
            sys.setswitchinterval(_SWITCH_S)
            share_heap()
            self._thread = threading.Thread(target=self._run, name="store", daemon=True)
            self._thread.start()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._rounds and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                taken = [self._rounds[i] for i in range(min(len(self._rounds), ROUNDS_AT_ONCE))]
            try:
                self._carry_out([effect for one in taken for effect in one.effects], self.outbox)
            except BaseException as error:  # the thread of the socket ends with it
                self._error = error
            with self._changed:
                for _ in taken:
                    self.waiting_bytes -= self._rounds.popleft().num_bytes
                self._changed.notify_all()
            with suppress(BlockingIOError):  # it is readable already
                os.write(self._write, b"x")
            if self._error is not None:
                return


def _bytes_of(effect: do.Effect) -> int:
    """Bytes of trajectories that an effect carries."""
    match effect:
        case do.AddTrajectories(blobs=blobs) if blobs:
            return sum(map(len, blobs))
        case do.AddTrajectories(trajectories=some) | do.AddDropped(trajectories=some) | do.SaveTurns(trajectories=some):
            return sum(t.tokens.nbytes + t.log_behaviour.nbytes for t in some)
    return 0
