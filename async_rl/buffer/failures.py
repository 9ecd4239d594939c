"""Why episodes failed: counted by reason, so that a console, a summary and a report can tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MOST_REASONS = 32
"""different ones that are counted apart"""
TOLD = 5
"""that are told, the most frequent first"""
LONGEST = 200
"""characters of one"""
OTHERS = "other reasons"
NOT_SAID = "no reason was given"


@dataclass(slots=True)
class Failures:
    """The failed episodes of a run by reason. Reasons that differ in their numbers only are one."""

    counts: dict[str, int] = field(default_factory=dict)
    """by the first of these reasons, as it was given"""
    first: dict[str, str] = field(default_factory=dict)
    """reason without its numbers -> the first of its kind"""
    last: str = ""
    """the newest"""

    def add(self, reason: str, count: int = 1) -> None:
        """So many more episodes failed for this reason."""
        text = " ".join(reason.split())[:LONGEST] or NOT_SAID
        self.last = text
        kind = re.sub(r"\d+(\.\d+)?", "0", text)
        if kind not in self.first and len(self.first) >= MOST_REASONS:
            kind = text = OTHERS
        known = self.first.setdefault(kind, text)
        self.counts[known] = self.counts.get(known, 0) + count

    def told(self) -> dict[str, int]:
        """The most frequent reasons with their counts, the others together."""
        return most_frequent(self.counts.items())


def most_frequent(counts: Iterable[tuple[str, int]], most: int = TOLD) -> dict[str, int]:
    """The `most` largest counts, and the sum of the others.

    Example:
        >>> most_frequent([("a", 1), ("b", 5), ("c", 2)], 1)
        {'b': 5, 'other reasons': 3}
    """
    ordered = sorted(counts, key=lambda pair: (pair[0] == OTHERS, -pair[1]))
    told = dict(ordered[:most])
    if rest := sum(count for _, count in ordered[most:]):
        told[OTHERS] = told.get(OTHERS, 0) + rest
    return told


def sentence(failures: Mapping[str, int]) -> str:
    """`10 x KeyError: 'gold' (my.py:3 judge); 2 x the reward is nan`."""
    return "; ".join(f"{count:,} x {reason}" for reason, count in failures.items())
