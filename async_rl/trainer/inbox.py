"""The trainer's messages to and from the buffer: it asks ahead, and waits by name and never without end.

Who waits for whom: the trainer waits for a batch, an evaluation or the buffer's counters, `wire.timeout_s` at most
without any progress. A message may get lost when a connection breaks, so the trainer repeats what the buffer must know
while it waits. Receiving a message twice, late or in another order changes nothing at the buffer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from async_rl.errors import RunFailed
from async_rl.trainer.canary_watch import CanaryWatch
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, WireTimeout
from async_rl.wire.frames import HARMLESS
from async_rl.wire.heartbeat import Activity

if TYPE_CHECKING:
    from async_rl.trainer.verifier import Verifier

POLL_EVALUATION_S = 0.05
REPEAT_S = 3.0
"""how often a waiting trainer repeats what the buffer must know"""


class Preempted(Exception):
    """The run was told to end by a signal: a checkpoint is due, and no further step."""


@dataclass(slots=True)
class RemainingWait:
    """The seconds that are left of a wait. Time in which this process was stopped does not count."""

    limit_s: float
    left_s: float = field(init=False)
    progress: float = -1.0
    """the buffer's, as last received"""

    def __post_init__(self) -> None:
        self.left_s = self.limit_s

    def spend(self, seconds: float) -> None:
        self.left_s -= min(seconds, REPEAT_S + 1.0)

    def renew(self, progress: float) -> None:
        """Start the wait anew if there is progress since: a slow episode is not a hang."""
        if progress != self.progress:
            self.progress, self.left_s = progress, self.limit_s


@dataclass(slots=True)
class Inbox:
    """What the trainer has received from the buffer, and what the buffer has yet to confirm.

    Answers come in any order: a batch asked for ahead may arrive while an evaluation is awaited.
    """

    dealer: Dealer
    timeout_s: float
    """longest wait without any progress"""
    canary: CanaryWatch
    """compares what generators show of their weights, wherever it arrives"""
    activity: Activity = field(default_factory=Activity)
    keepalive: Callable[[], None] = lambda: None
    """called every few seconds while it waits"""
    verifier: Verifier | None = None
    """takes trajectories that are to be verified, and scores them while the trainer waits; None: none are verified"""
    unconfirmed: dict[type, msg.Message] = field(default_factory=dict)
    """the newest message of each kind that the buffer must know, in the order in which they are repeated"""
    sent_again: float = 0.0
    batches: dict[int, msg.Batch] = field(default_factory=dict)
    """whole ones, of the step waited for and those asked for ahead"""
    parts: dict[int, list[Trajectory]] = field(default_factory=dict)
    """what has arrived of batches that are larger than one message"""
    wanted: int = 0
    """step of the next batch that will be taken"""
    evaluations: dict[int, msg.EvaluationResult] = field(default_factory=dict)
    snapshots: list[msg.Snapshot] = field(default_factory=list)
    asked: int = -1
    """newest step whose batch was asked for"""
    last_reason: str = ""
    """the reason that the buffer last gave for a wait"""
    progress: int = -1
    """the buffer's count of what has arrived there, as last received"""
    preempted: str = ""
    """the signal by which the run was told to write a checkpoint and end; empty: none"""

    def check_preempted(self) -> None:
        """Raises Preempted when the run was told to end. Called where the trainer's state is that between two steps."""
        if self.preempted:
            raise Preempted(self.preempted)

    def send(self, message: msg.Message) -> None:
        """Send the buffer something that it must know, and repeat it while waiting. May be called in any thread."""
        self.unconfirmed[type(message)] = message
        self.dealer.send(message)

    def ask_batch(self, step: int) -> None:
        """Ask for the batch of `step`, ahead of need."""
        if step > self.asked:
            self.asked = step
            self.send(msg.NextBatch(step=step))

    def has_come(self, step: int) -> bool:
        """Whether the batch of `step` is here, or something that ends the wait for it; without waiting."""
        self.ask_batch(step)
        self.drain()
        return step in self.batches or bool(self.preempted)

    def receive_batch(self, step: int) -> msg.Batch:
        """Wait for the batch of `step`. Raises RunFailed that names who was waited for."""
        self.ask_batch(step)
        wait_left = RemainingWait(self.timeout_s)
        with self.activity.during(f"waiting for the batch of step {step}"):
            while step not in self.batches:
                self.check_preempted()
                self._receive(wait_left, f"the batch of step {step}")
                wait_left.renew(self.progress + len(self.parts.get(step, ())))
        self.last_reason = ""
        self.wanted = step + 1
        return self.batches.pop(step)

    def evaluation(self, number: int, *, wait: bool) -> msg.EvaluationResult | None:
        """The result of an evaluation asked for before; None when it is not complete and `wait` is false.

        Raises RunFailed when nothing has moved for `timeout_s`."""
        if not wait:
            return self._fetch(number, waits=False)
        wait_left = RemainingWait(self.timeout_s)
        with self.activity.during(f"waiting for evaluation {number}"):
            while True:
                self.check_preempted()
                started = time.monotonic()
                result = self._fetch(number, waits=True, wait_left=wait_left)
                if result is not None:
                    return result
                time.sleep(POLL_EVALUATION_S)
                wait_left.spend(time.monotonic() - started)

    def _fetch(
        self, number: int, *, waits: bool, wait_left: RemainingWait | None = None
    ) -> msg.EvaluationResult | None:
        """Ask how far an evaluation is; returns the result when it is complete."""
        self.evaluations.pop(number, None)
        self.send(msg.FetchEvaluation(evaluation=number, waits=waits))
        answer = RemainingWait(self.timeout_s)
        while number not in self.evaluations:
            self._receive(answer, f"the buffer's word on evaluation {number}")
        result = self.evaluations.pop(number)
        del self.unconfirmed[msg.FetchEvaluation]
        if result.finished:
            if isinstance(asked := self.unconfirmed.get(msg.Evaluate), msg.Evaluate) and asked.evaluation == number:
                del self.unconfirmed[msg.Evaluate]
            return result
        if wait_left is not None:
            wait_left.renew(float(result.progress))
            if wait_left.left_s <= 0:
                raise RunFailed(
                    f"waited {self.timeout_s:g} s (wire.timeout_s) for another token or trajectory of evaluation "
                    f"{number}, {result.missing} are missing; {result.reason}"
                )
        return None

    def snapshot(self) -> msg.Snapshot:
        """The buffer's state now."""
        self.snapshots.clear()
        self.send(msg.Query())
        wait_left = RemainingWait(self.timeout_s)
        while not self.snapshots:
            self._receive(wait_left, "the buffer's counters")
        del self.unconfirmed[msg.Query]
        return self.snapshots.pop()

    def consumed(self, version: int) -> msg.BufferCounters:
        """Wait until the buffer has noted the checkpoint of `version`; its counters then. Raises RunFailed."""
        wait_left = RemainingWait(self.timeout_s)
        while (snapshot := self.snapshot()).consumed < version:
            started = time.monotonic()
            time.sleep(POLL_EVALUATION_S)
            self._send_again()
            wait_left.spend(time.monotonic() - started)
            if wait_left.left_s <= 0:
                raise RunFailed(f"waited {self.timeout_s:g} s (wire.timeout_s) for the buffer to note step {version}")
        return snapshot.counters

    def drain(self) -> None:
        """Handle what has arrived, without waiting."""
        while True:
            try:
                message = self.dealer.receive(0.0, "anything")
            except WireTimeout:
                return
            except WireError as error:
                raise RunFailed(f"the trainer cannot read what the buffer sends: {error}") from None
            self._handle(message)

    def _receive(self, wait_left: RemainingWait, waiting_for: str) -> None:
        """Wait for one message, REPEAT_S at most, and handle it."""
        self.keepalive()
        if self.verifier is not None:
            self.verifier.work()
        if wait_left.left_s <= 0:
            last = f"; last heard: {self.last_reason}" if self.last_reason else ""
            raise RunFailed(f"waited {self.timeout_s:g} s (wire.timeout_s) for {waiting_for}{last}")
        started = time.monotonic()
        try:
            self._handle(self.dealer.receive(min(REPEAT_S, wait_left.left_s), waiting_for))
        except WireTimeout:
            self._send_again()
        except WireError as error:
            raise RunFailed(f"the trainer cannot read what the buffer sends: {error}") from None
        wait_left.spend(time.monotonic() - started)

    def _send_again(self) -> None:
        """Repeat what the buffer must know; any of it may have been lost."""
        now = time.monotonic()
        if now - self.sent_again >= REPEAT_S:
            self.sent_again = now
            for message in list(self.unconfirmed.values()):  # another thread may add the newest version
                self.dealer.send(message)

    def _handle(self, message: msg.Message) -> None:
        match message:
            case msg.Batch():
                self._add_batch(message)
            case msg.EvaluationResult(evaluation=evaluation):
                self.evaluations[evaluation] = message
            case msg.Snapshot():
                self.snapshots.append(message)
            case msg.Canary():
                self.canary.receive(message)
            case msg.Verify() if self.verifier is not None:
                self.verifier.receive(message)
            case msg.Waiting(reason=reason, progress=progress):
                self.last_reason, self.progress = reason, progress
                self._send_again()  # the buffer waits too, perhaps for a message of this trainer that was lost
            case msg.Refused(what=what, kind=kind) if kind in HARMLESS or what == "FetchEvaluation":
                pass  # the Hello or the Evaluate before it was lost; they are repeated
            case msg.Refused(what=what, reason=reason):
                raise RunFailed(f"the buffer refused {what}: {reason}")
            case msg.Preempt(reason=reason):
                self.preempted = reason
            case msg.Stop(reason=reason):
                raise RunFailed(f"the buffer stopped: {reason}")
            case _:
                pass

    def _add_batch(self, part: msg.Batch) -> None:
        """Add a part of a batch; ask for what is missing. Batches that were received before are not kept again."""
        step = part.step
        if step < self.wanted or step in self.batches:
            return
        have = self.parts.setdefault(step, [])
        if part.after == len(have):
            have += part.trajectories
        if len(have) < part.total:
            self.send(msg.NextBatch(step=step, after=len(have)))
            return
        self.unconfirmed.pop(msg.NextBatch, None)
        self.batches[step] = replace(part, trajectories=tuple(self.parts.pop(step)), after=0)
