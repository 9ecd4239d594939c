"""bench/schedules.py plays a million schedules in one process: it must not keep any of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import gc, sys
sys.path.insert(0, sys.argv[1])
import schedules

schedules.BLOCK = 6


def play(first):
    met, failed = schedules.play_block(first)
    assert not failed, failed


def kept():
    gc.collect()
    return gc.get_freeze_count() + len(gc.get_objects())


play(0)
before = kept()
for first in range(6, 30, 6):
    play(first)
print(kept() - before)
"""


def test_nothing_of_a_block_is_kept() -> None:
    bench = Path(__file__).resolve().parents[2] / "bench"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(bench)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000, "a schedule leaves some ten thousand objects"
