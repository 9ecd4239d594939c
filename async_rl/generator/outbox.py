"""Finished trajectories until the buffer has acknowledged them: sent, and sent again when no answer comes.

The buffer stores each once and acknowledges it each time, so a lost message or a lost answer does no harm.
`BufferDeadline` reports a long wait for an acknowledgement and ends the process when it is too long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from async_rl.errors import RunFailed
from async_rl.events import RecordEvent, StallReported, ignore_event
from async_rl.stall_timer import StallTimer
from async_rl.trajectory import Trajectory

RESEND_S = 3.0
"""seconds until an unacknowledged trajectory is sent again; they double with each repetition"""


@dataclass(slots=True)
class Unacknowledged:
    """A trajectory that was sent and is not acknowledged yet."""

    trajectory: Trajectory
    since: float
    """when it was sent first"""
    resend_at: float
    pause_s: float = RESEND_S


@dataclass(slots=True)
class Outbox:
    """The trajectories of one generator that are not acknowledged. Times are seconds of one monotonic clock."""

    fresh: list[Trajectory] = field(default_factory=list)
    """not sent yet"""
    sent: dict[tuple[int, int], Unacknowledged] = field(default_factory=dict)
    """by (group, sample)"""

    def put(self, trajectory: Trajectory) -> None:
        self.fresh.append(trajectory)

    def take(self, now: float) -> tuple[Trajectory, ...]:
        """Trajectories to send for the first time; they count as sent."""
        taken, self.fresh = tuple(self.fresh), []
        for trajectory in taken:
            self.sent[trajectory.group, trajectory.sample] = Unacknowledged(trajectory, now, now + RESEND_S)
        return taken

    def late(self, now: float) -> tuple[Trajectory, ...]:
        """Trajectories to send again."""
        late = [sent for sent in self.sent.values() if now >= sent.resend_at]
        for sent in late:
            sent.pause_s *= 2
            sent.resend_at = now + sent.pause_s
        return tuple([sent.trajectory for sent in late])

    def acknowledge(self, pairs: Iterable[tuple[int, int]]) -> None:
        """The buffer has stored these (group, sample)."""
        for pair in pairs:
            self.sent.pop(pair, None)

    def excuse(self, seconds: float) -> None:
        """Take `seconds` in which this process could not receive out of all waits."""
        for sent in self.sent.values():
            sent.since += seconds

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """(group, sample) of all trajectories in the outbox."""
        return {*self.sent, *((t.group, t.sample) for t in self.fresh)}

    def waited_s(self, now: float) -> float:
        """How long the oldest has waited for its acknowledgement, seconds."""
        return now - min((sent.since for sent in self.sent.values()), default=now)


@dataclass(slots=True)
class BufferDeadline:
    """How long one generator waits for the buffer."""

    name: str
    """of the generator"""
    limit_s: float
    """wire.timeout_s"""
    stall: StallTimer
    """when a wait is reported"""
    buffer_silent_s: Callable[[], float] = lambda: 0.0
    record: RecordEvent = ignore_event
    """writes an event of the run"""

    def check(self, outbox: Outbox, now: float) -> None:
        """Report a long wait for an acknowledgement, then again at twice its length. Raises RunFailed when it, or the
        buffer's silence, exceeds `limit_s`."""
        if (silent := self.buffer_silent_s()) > self.limit_s:
            limit = f"(wire.timeout_s={self.limit_s:g})"
            raise RunFailed(f"{self.name} has heard nothing of the buffer for {silent:.0f} s {limit}")
        waited, many = outbox.waited_s(now), f"{len(outbox.sent)} trajectories"
        if waited > self.limit_s:
            limit = f"{self.limit_s:g} s (wire.timeout_s)"
            raise RunFailed(f"{self.name} waited {limit} for the buffer to acknowledge {many}")
        if self.stall.due(waited):
            group, sample = next(iter(outbox.sent))
            text = (
                f"{self.name} waits {waited:.0f} s for the buffer to acknowledge {many}, the first is sample {sample} "
                f"of group {group}; last heard of the buffer {silent:.1f} s ago"
            )
            self.record(StallReported(waits=self.name, what="acknowledgement", seconds=round(waited, 3), text=text))
