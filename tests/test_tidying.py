"""A process that lives for days gives freed memory back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from async_rl.tidying import TIDY_S, Tidying

TUPLES = """
import sys
from async_rl.tidying import TIDY_S, Tidying, freeze_set_up

freeze_set_up()
tidying = Tidying() if sys.argv[1] == "tidy" else None
before = sys.getallocatedblocks()
for number in range(150):
    for length in range(1, 20):
        [tuple(x for x in range(length)) for _ in range(15)]
    if tidying is not None:
        tidying.due = 0.0
        tidying.round(1000.0)
print(sys.getallocatedblocks() - before)
"""
HEAP = """
import ctypes, sys
from pathlib import Path
from async_rl.tidying import Tidying

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)

def anonymous_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

before = anonymous_kb()
blocks = []
for number in range(400):  # 40 MB in blocks below the size that is mapped by itself
    blocks.append(libc.malloc(100_000))
    ctypes.memset(blocks[-1], 1, 100_000)
for number, block in enumerate(blocks):
    if number % 20 != 19:  # what stays keeps the heap from ending earlier
        libc.free(block)
if sys.argv[1] == "tidy":
    Tidying().round(1000.0)
print(anonymous_kb() - before)
"""


def both(program: str) -> tuple[int, int]:
    """What the program says with tidying, and without."""
    found = []
    for how in ("tidy", "by itself"):
        done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True)
        found.append(int(done.stdout))
    return found[0], found[1]


def test_freed_tuples_do_not_gather() -> None:
    """A tuple made of a generator leaves a place in one of Python's lists of freed ones: up to 2000 of each length.
    Such places were what the buffer grew by for an hour."""
    tidy, by_itself = both(TUPLES)
    assert tidy < 6000 < 20_000 < by_itself


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_free_pages_between_used_blocks_are_given_back() -> None:
    """A trainer grew by such pages, in the heaps of its threads too."""
    tidy, by_itself = both(HEAP)
    assert tidy < 10_000 < 30_000 < by_itself


def test_rounds_have_their_time_and_become_rare_where_they_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr("async_rl.tidying.trim_heap", lambda: done.append(1))
    clock = iter([0.0, 0.001, 10.0, 10.2])
    monkeypatch.setattr("async_rl.tidying.time.perf_counter", lambda: next(clock))
    tidying = Tidying()
    assert tidying.round(100.0)
    assert not tidying.round(100.0 + TIDY_S - 1)
    assert tidying.round(100.0 + TIDY_S)  # takes 0.2 s: a hundred seconds, at most a share of 0.002
    assert not tidying.round(100.0 + TIDY_S + 99)
    assert len(done) == 2
