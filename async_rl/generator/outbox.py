"""Finished trajectories until the buffer has acknowledged them: sent, and sent again when no answer comes.

The buffer takes each once and acknowledges it each time, so a message or an answer that got lost does no harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from async_rl.errors import RunFailed
from async_rl.trajectory import Trajectory

AGAIN_S = 3.0
"""after so many seconds what is not acknowledged is sent again, then after twice as many"""


@dataclass(slots=True)
class Sent:
    """A trajectory that is on its way."""

    trajectory: Trajectory
    since: float
    """when it was sent first"""
    again_at: float
    pause_s: float = AGAIN_S


@dataclass(slots=True)
class Outbox:
    """Times are those of one monotonic clock, seconds."""

    fresh: list[Trajectory] = field(default_factory=list)
    """not sent yet"""
    sent: dict[tuple[int, int], Sent] = field(default_factory=dict)
    """by (group, sample)"""

    def put(self, trajectory: Trajectory) -> None:
        self.fresh.append(trajectory)

    def take(self, now: float) -> tuple[Trajectory, ...]:
        """Those to be sent for the first time; they count as sent."""
        taken, self.fresh = tuple(self.fresh), []
        for trajectory in taken:
            self.sent[trajectory.group, trajectory.sample] = Sent(trajectory, now, now + AGAIN_S)
        return taken

    def late(self, now: float) -> tuple[Trajectory, ...]:
        """Those to be sent again."""
        late = [sent for sent in self.sent.values() if now >= sent.again_at]
        for sent in late:
            sent.pause_s *= 2
            sent.again_at = now + sent.pause_s
        return tuple([sent.trajectory for sent in late])

    def acknowledge(self, pairs: Iterable[tuple[int, int]]) -> None:
        """These, (group, sample), are in the store."""
        for pair in pairs:
            self.sent.pop(pair, None)

    def excuse(self, seconds: float) -> None:
        """So long no answer could be heard: it does not count as waiting."""
        for sent in self.sent.values():
            sent.since += seconds

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """(group, sample) of everything in it."""
        return {*self.sent, *((t.group, t.sample) for t in self.fresh)}

    def waited_s(self, now: float) -> float:
        """How long the oldest waits for its acknowledgement."""
        return now - min((sent.since for sent in self.sent.values()), default=now)


# -------------------- patience
# How long a generator waits for the buffer: a long wait is reported, too long a one ends the process.


def no_event(event: str, **_: object) -> None:
    """For a generator without a record of its run."""


@dataclass(slots=True)
class Patience:
    """Of one generator, with the only one it waits for."""

    name: str
    limit_s: float
    """wire.timeout_s"""
    report_s: float
    """wire.stall_report_s"""
    buffer_silent_s: Callable[[], float] = lambda: 0.0
    event: Callable[..., None] = no_event
    """writes an event of the run"""
    told_at: float = 0.0
    """length of the wait when it was reported last"""

    def look(self, outbox: Outbox, now: float) -> None:
        """Report a long wait for an acknowledgement. Raises RunFailed when it, or silence, is too long."""
        if (silent := self.buffer_silent_s()) > self.limit_s:
            limit = f"(wire.timeout_s={self.limit_s:g})"
            raise RunFailed(f"{self.name} has heard nothing of the buffer for {silent:.0f} s {limit}")
        waited, many = outbox.waited_s(now), f"{len(outbox.sent)} trajectories"
        if waited > self.limit_s:
            limit = f"{self.limit_s:g} s (wire.timeout_s)"
            raise RunFailed(f"{self.name} waited {limit} for the buffer to acknowledge {many}")
        if waited < self.report_s:
            self.told_at = 0.0
        elif waited >= 2 * self.told_at:
            self.told_at = waited
            group, sample = next(iter(outbox.sent))
            text = (
                f"{self.name} waits {waited:.0f} s for the buffer to acknowledge {many}, the first is sample {sample} "
                f"of group {group}; last heard of the buffer {silent:.1f} s ago"
            )
            detail = {"waits": self.name, "for": "acknowledgement", "seconds": round(waited, 3), "text": text}
            self.event("stall", **detail, time=time.time())
