"""What the launcher knows of its children: their signs of life, through a pipe that each of them writes to.

A child that lives says so about every second, from a thread of its own (wire/heartbeat.py), however busy it
is. One that has said nothing for `wire.frozen_after_s` is frozen: stopped, swapped out, or in code that never
gives Python's lock back. It is no use waiting for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

START_S = 20.0
"""time a process gets until its first sign, before it imports torch; a cold disk may hold that up"""
_READ_BYTES = 1 << 16


@dataclass(slots=True)
class Sign:
    """The last sign of life of one process."""

    name: str
    heard: float
    """when it came, or when the process was started; monotonic clock"""
    doing: str = ""
    """empty: nothing came yet"""
    since: float = 0.0
    """when it began that"""
    of: int = 0
    """of a rank of the trainer: process number of the child that started it; 0: it is a child itself"""


@dataclass(slots=True)
class Vitals:
    """By process number, so that a generator's new life is not taken for its old one."""

    limit_s: float
    ends: tuple[int, int] = field(init=False)
    """of the pipe: where the launcher reads, where children write"""
    signs: dict[int, Sign] = field(default_factory=dict)
    _looked: float = -1.0
    """when; before the first time -1"""
    _partial: bytes = b""

    def __post_init__(self) -> None:
        self.ends = os.pipe()
        for end in self.ends:
            os.set_blocking(end, False)  # neither side ever waits for the other

    def began(self, pid: int, name: str, now: float) -> None:
        """A child was started."""
        self.signs[pid] = Sign(name, now)

    def ended(self, pid: int) -> None:
        """With it those that it started."""
        self.signs.pop(pid, None)
        for other in [number for number, sign in self.signs.items() if sign.of == pid]:
            del self.signs[other]

    def look(self, now: float) -> None:
        """Take in what has come. When the launcher itself was away, everybody gets their time anew."""
        while True:
            try:
                new = os.read(self.ends[0], _READ_BYTES)
            except BlockingIOError:
                break
            *lines, self._partial = (self._partial + new).split(b"\n")
            for line in lines:
                with suppress(ValueError):  # a line cut by a full pipe
                    self._hear(json.loads(line), now)
        if 0 <= self._looked < now - self.limit_s / 2:
            for sign in self.signs.values():
                sign.heard = now
        self._looked = now

    def frozen(self, now: float) -> list[tuple[int, str]]:
        """(pid, why) of those that have been silent for too long."""
        found = []
        for pid, sign in self.signs.items():
            silent = now - sign.heard
            if silent > (self.limit_s if sign.doing else max(self.limit_s, START_S)):
                found.append((pid, f"gave no sign of life for {silent:.1f} s {self._last(sign, now)}"))
        return found

    def rows(self, now: float) -> list[dict[str, object]]:
        """One a process, in plain values. What started the trainer's ranks stands behind them."""
        heard = {sign.of for sign in self.signs.values()}
        return [
            {
                "name": sign.name,
                "pid": pid,
                "doing": sign.doing or "starting",
                "since_s": round(now - (sign.since if sign.doing else sign.heard), 3),
                "silent_s": round(now - sign.heard, 3),
            }
            for pid, sign in self.signs.items()
            if pid not in heard
        ]

    def close(self) -> None:
        for end in self.ends:
            os.close(end)

    def _hear(self, line: Mapping[str, object], now: float) -> None:
        match line:
            case {"pid": int(pid), "name": str(name), "of": int(of)} if of in self.signs and pid not in self.signs:
                self.signs[pid] = Sign(name, now, of=of)  # a rank, heard of for the first time
        match line:
            case {"pid": int(pid), "doing": str(doing), "since_s": int() | float() as seconds} if pid in self.signs:
                sign = self.signs[pid]
                sign.heard, sign.doing, sign.since = now, doing, now - seconds

    def _last(self, sign: Sign, now: float) -> str:
        limit = f"(wire.frozen_after_s={self.limit_s:g})"
        if not sign.doing:
            return f"{limit} since it was started: it hangs before its first line"
        for_s = sign.heard - sign.since
        return (
            f"{limit}: it is frozen (stopped, or held up by code that blocks all of Python); "
            f"last heard: {sign.doing}, for {for_s:.1f} s"
        )
