"""Named parts of a reward, as a trajectory records them: `info["reward/NAME"]`.

A part that an episode does not have (its reward gave none, or None) is missing, not 0: it is in no mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice

PREFIX = "reward/"
POOL_PREFIX = "pool/"
"""of what the experience pool says of a trajectory (reuse.py)"""
MOST_NOTES = 32
"""numbers of one trajectory that become metrics"""
LARGEST = 3e38
"""size of a number that is shown, at most; whatever is no finite float32 has no mean"""


def parts_in(info: Mapping[str, float | str]) -> dict[str, float]:
    """Name -> value of the parts among a trajectory's notes.

    Example:
        >>> parts_in({"tool_calls": 2.0, "reward/format": 1.0})
        {'format': 1.0}
    """
    if not info:
        return {}
    return {
        name.removeprefix(PREFIX): float(value)
        for name, value in info.items()
        if name.startswith(PREFIX) and not isinstance(value, str) and abs(value) <= LARGEST
    }


def notes_in(info: Mapping[str, float | str]) -> dict[str, float]:
    """Name -> value of the other numbers among a trajectory's notes, the first `MOST_NOTES` of them.

    Example:
        >>> notes_in({"tool_calls": 2.0, "reward/format": 1.0, "level": "hard"})
        {'tool_calls': 2.0}
    """
    if not info:
        return {}
    numbers = (
        (name, v) for name, v in info.items() if not isinstance(v, str) and not name.startswith((PREFIX, POOL_PREFIX))
    )
    return {name: float(value) for name, value in islice(numbers, MOST_NOTES) if abs(value) <= LARGEST}


def part_means(episodes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Name -> mean over the episodes that have the part, in the order of first appearance.

    Example:
        >>> part_means([{"format": 1.0, "correct": 0.0}, {"correct": 1.0}, {}])
        {'format': 1.0, 'correct': 0.5}
    """
    values: dict[str, list[float]] = {}
    for parts in episodes:
        for name, value in parts.items():
            values.setdefault(name, []).append(value)
    return {name: math.fsum(found) / len(found) for name, found in values.items()}
