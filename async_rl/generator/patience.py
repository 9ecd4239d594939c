"""How long a generator waits for the buffer: a long wait is reported, too long a one ends the process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from async_rl.errors import RunFailed
from async_rl.generator.outbox import Outbox


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
