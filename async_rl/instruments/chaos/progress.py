"""The progress of a run as its files show it: steps done, processes started, the longest time without either."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from async_rl.run_folder import RowTail, RunFolder

STARTS = ("started", "buffer_ready", "trainer_ready", "generator_ready", "resumed")
MOVES = (*STARTS, "evaluation", "checkpoint")
"""events that are progress"""


@dataclass(slots=True)
class RunProgress:
    """What `poll` has found out so far. Times are of the clock that is passed in, seconds."""

    folder: RunFolder
    moved_at: float
    """when the last progress was seen"""
    steps_done: int = 0
    """training steps in the present launch"""
    furthest: int = 0
    """training steps in any launch"""
    stepped_at: float = -1.0
    """when the last metric row came"""
    longest_stall_s: float = 0.0
    stalled_where: str = ""
    last: str = "the start"
    """the newest progress"""
    _metrics: RowTail = field(init=False)
    _events: RowTail = field(init=False)
    _known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._metrics, self._events = RowTail(self.folder.metrics), RowTail(self.folder.events)

    def poll(self, now: float) -> Sequence[Mapping[str, Any]]:
        """Read what is new in the run's files; the new events, in order."""
        rows, anew = self._metrics.poll()
        replaced = anew and self.steps_done > 0
        if rows:
            self.steps_done = int(rows[-1]["step"]) + 1
        elif replaced:
            self.steps_done = 0
        if rows and not replaced:  # what a resumed run keeps is no progress
            self.furthest = max(self.furthest, self.steps_done)
            self.stepped_at = now
            self._moved(now, f"step {self.steps_done - 1}")
        fresh = []
        for event in self._events.new():  # after a replacement all of them come again
            key = json.dumps(event, sort_keys=True)
            if key not in self._known:
                self._known.add(key)
                fresh.append(event)
        for event in fresh:
            if event["event"] in MOVES:
                what = event.get("process") or event.get("name") or event.get("version") or event.get("step")
                self._moved(now, event["event"] + (f" ({what})" if what is not None else ""))
        self._stall(now, "")
        return fresh

    def stalled_s(self, now: float) -> float:
        """Since the last progress."""
        return now - self.moved_at

    def _moved(self, now: float, what: str) -> None:
        self._stall(now, what)
        self.moved_at, self.last = now, what

    def _stall(self, now: float, until: str) -> None:
        if self.stalled_s(now) >= self.longest_stall_s:
            self.longest_stall_s = self.stalled_s(now)
            self.stalled_where = f"after {self.last}" + (f", before {until}" if until else "")
