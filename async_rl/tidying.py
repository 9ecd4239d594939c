"""What keeps the memory of a process that runs for days flat (`Tidying`), and the C library's heaps."""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass

TIDY_S = 20.0
"""seconds between two rounds of tidying, at least"""
YOUNG = 50_000
"""containers made and not freed since the last look for garbage among them"""
MOST_SHARE = 0.002
"""of the time, at most, that is spent on it: rounds that take long become rare"""
_M_ARENA_MAX = -8
"""of glibc's mallopt"""


def freeze_set_up() -> None:
    """Setting up is over: what imports and set-up made is never garbage, and later collections skip it. Those come
    after YOUNG new objects instead of 700: a step of many short episodes makes 20,000 that live until its end, and was
    interrupted thirty times to look at them. What garbage there is waits for `Tidying`."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])


@dataclass(slots=True)
class Tidying:
    """Gives back, from time to time, what Python and the C library keep of freed memory.

    There is next to no garbage, so that Python hardly ever makes a full collection by itself. But only that empties its
    lists of freed tuples: up to 2000 of each length below 20, each of which grows by one with `tuple(x for ...)`. The C
    library gives back what is free at the end of its heap, not what is free between blocks that are used; each thread
    that begins and ends (publications, checkpoints) may have a heap of its own. Without this a process grows for hours,
    ever more slowly, by some megabytes."""

    due: float = 0.0
    """when the next round is, monotonic clock"""

    def round(self, now: float) -> bool:
        """Tidy up if it is time to; whether it was. `now`: seconds, monotonic."""
        if now < self.due:
            return False
        began = time.perf_counter()
        gc.collect()
        trim_heap()
        self.due = now + max(TIDY_S, (time.perf_counter() - began) / MOST_SHARE)
        return True


def trim_heap() -> None:
    """Give the free pages of all heaps of the C library back to the system; does nothing where it is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def share_heap() -> None:
    """Threads that begin from now on take memory from one heap: what one of them frees, the others use. Does nothing
    where the C library is not glibc."""
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(_M_ARENA_MAX, 1)
