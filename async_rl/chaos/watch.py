"""A run watched from outside through its files: how far it is, who was started, when it last moved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.run_folder import RunFolder

STARTS = ("started", "buffer_ready", "trainer_ready", "generator_ready", "resumed")
MOVES = (*STARTS, "evaluation", "checkpoint")
"""events that are progress"""


@dataclass(slots=True)
class Lines:
    """The whole lines of a file that grows, and is now and then replaced by a shorter one."""

    path: Path
    _inode: int = -1
    _offset: int = 0

    def new(self) -> tuple[bool, list[Mapping[str, Any]]]:
        """(whether it was replaced, rows that were not there before, or all of a replaced file)"""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                replaced = self._inode >= 0 and (status.st_ino != self._inode or status.st_size < self._offset)
                if replaced or self._inode < 0:
                    self._offset = 0
                self._inode = status.st_ino
                if status.st_size == self._offset:
                    return replaced, []
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return False, []
        self._offset += len(whole) + len(newline)
        return replaced, [json.loads(line) for line in whole.splitlines()] if newline else []


@dataclass(slots=True)
class Watch:
    """What `look` found out so far. Times are of the clock that is passed in, seconds."""

    folder: RunFolder
    moved_at: float
    """last progress"""
    steps_done: int = 0
    """in the present life"""
    furthest: int = 0
    """in any life"""
    stepped_at: float = -1.0
    """last new metric row"""
    longest_stall_s: float = 0.0
    stalled_where: str = ""
    last: str = "the start"
    """the progress before the present wait"""
    _metrics: Lines = field(init=False)
    _events: Lines = field(init=False)
    _known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._metrics, self._events = Lines(self.folder.metrics), Lines(self.folder.events)

    def look(self, now: float) -> list[Mapping[str, Any]]:
        """New events, in order."""
        replaced, rows = self._metrics.new()
        if rows:
            self.steps_done = int(rows[-1]["step"]) + 1
        elif replaced:
            self.steps_done = 0
        if rows and not replaced:  # what a resumed run keeps is no progress
            self.furthest = max(self.furthest, self.steps_done)
            self.stepped_at = now
            self._moved(now, f"step {self.steps_done - 1}")
        fresh = []
        for event in self._events.new()[1]:  # after a replacement all of them come again
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
