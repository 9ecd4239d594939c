"""How many threads a step of the embedded engine takes on a CPU that it shares with the trainer (`ThreadShare`).

Threads that share an operation wait for the slowest of them. Where the trainer is at work on the same cores, that one
waits for a core, and two threads are slower than one and hold the trainer up (SmolLM2 on two cores: a training step
took 4.8 s beside two threads of the generator and 4.3 s beside one). Where the trainer waits for a batch, cores are
idle and should be used. So the engine looks at what the system says of its waiting, and of idle cores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

LOOK_S = 0.25
"""of steps, between two looks"""
CROWDED = 0.2
"""seconds for which all threads together wait for a core, in a second of steps: beyond it, steps take one thread"""
FREE = 0.6
"""idle cores beside one working thread: beyond it, steps take all threads"""
BUSY = 0.8
"""of the time between two looks: with less spent in steps, idle cores say nothing"""
PAUSE_S, LONGEST_PAUSE_S = 1.0, 16.0
"""pause after all threads were too many, before they are tried again. It doubles when a new try fails soon"""
TRIED_S = 2.0
"""a try that fails within this time has failed soon"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the system has counted so far, in seconds."""

    waited: float
    """for a core, by all threads of this process"""
    idle: float
    """of all cores"""


def read_usage() -> Usage | None:
    """None where the system does not say (schedstat of Linux)."""
    try:
        waited = sum(int((task / "schedstat").read_text().split()[1]) for task in Path("/proc/self/task").iterdir())
        idle = sum(map(int, Path("/proc/stat").read_text().split(None, 6)[4:6]))
    except (OSError, IndexError, ValueError):
        return None
    return Usage(waited=waited / 1e9, idle=idle / os.sysconf("SC_CLK_TCK"))


@dataclass(slots=True, kw_only=True)
class ThreadShare:
    """A context in which a step runs with the number of threads that is best now, `most` or 1."""

    most: int
    read: Callable[[], Usage | None] = read_usage
    clock: Callable[[], float] = time.monotonic
    threads: int = field(init=False)
    _usage: Usage | None = field(init=False)
    _looked: float = field(init=False)
    _in_steps: float = 0.0
    """since the last look"""
    _began: float = 0.0
    """of the step"""
    _taken: float = float("-inf")
    """when all threads were taken last"""
    _pause: float = PAUSE_S
    _until: float = float("-inf")
    """no more threads are tried before"""

    def __post_init__(self) -> None:
        self.threads, self._usage, self._looked = self.most, self.read(), self.clock()

    def __enter__(self) -> None:
        self._began = self.clock()
        if self.threads != self.most:
            torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        if self.threads != self.most:
            torch.set_num_threads(self.most)
        now = self.clock()
        self._in_steps += now - self._began
        if self._in_steps >= LOOK_S:
            self._look(now)

    def _look(self, now: float) -> None:
        before, spent, in_steps = self._usage, now - self._looked, self._in_steps
        self._usage, self._looked, self._in_steps = self.read(), now, 0.0
        if before is None or self._usage is None:
            return
        crowded = self._usage.waited - before.waited > CROWDED * in_steps
        free = in_steps > BUSY * spent and self._usage.idle - before.idle > FREE * spent
        if self.threads > 1 and crowded:
            soon = now - self._taken < TRIED_S
            self._pause = min(LONGEST_PAUSE_S, 2 * self._pause) if soon else PAUSE_S
            self.threads, self._until = 1, now + self._pause
        elif self.threads < self.most and free and now >= self._until:
            self.threads, self._taken = self.most, now
