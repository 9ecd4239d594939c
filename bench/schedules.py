"""Schedules of faults on whole runs on a virtual clock, as many as wanted: `make schedules` plays a million.

    python bench/schedules.py [--schedules 1000000] [--first 0] [--jobs N]

Each is tests/support_world.py's: policy, sizes, losses, delays, deaths, freezes, partitions, lying and poisoned
generators, all drawn from its number. What must never happen is watched in every one. A schedule that fails is printed
with its number, which plays it again, and the exit code is 1. One takes some 15 ms of a core (the last line says how
much it was), so that a million fit into a night on two cores.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

BLOCK = 100
KEPT = ("generator_quarantined", "problem_refused", "generator_lost", "generator_left", "steps")


def play_block(first: int) -> tuple[Counter[str], list[str]]:
    """What BLOCK schedules from this number on met, and those that failed."""
    from support_world import play, some_world

    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()  # of a block that was played before nothing is kept: it would be frozen as garbage, and stay
    gc.set_threshold(100_000, 20, 20)  # a world is small, and what it leaves behind is collected with the next ones
    met: Counter[str] = Counter()
    failed: list[str] = []
    for number in range(first, first + BLOCK):
        world = some_world(number)
        try:
            seen = play(world)
        except Exception as error:
            failed.append(f"schedule {number}: {type(error).__name__}: {error}; {world.story}"[:1000])
            continue
        met += Counter({name: seen.counts[name] for name in KEPT})
        met["launches"] += world.launches
        met["faults"] += len(world.story)
    return met, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    began, met, played, wrong = time.monotonic(), Counter[str](), 0, 0
    with multiprocessing.Pool(args.jobs) as pool:
        for found, failed in pool.imap_unordered(play_block, range(args.first, args.first + args.schedules, BLOCK)):
            met += found
            played += BLOCK
            wrong += len(failed)
            print(*failed, sep="\n", end="\n" if failed else "", flush=True)
            if played % (10 * BLOCK) == 0:
                print(f"{played} schedules, {wrong} failed, {time.monotonic() - began:.0f} s", flush=True)
        pool.close()
        pool.join()  # its processor time counts when it has ended
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    each = 1000 * (spent.ru_utime + spent.ru_stime) / max(1, played)
    took = time.monotonic() - began
    print(f"{played} schedules in {took:.0f} s, {each:.1f} ms of a core each, {wrong} failed; met {dict(met)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
