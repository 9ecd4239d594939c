"""Curves thin enough to draw, on which no spike is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 1200
"""longer curves are drawn as this many buckets: more than a screen has columns for one plot"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A metric against step. Of a bucket of several steps: mean, lowest and highest value."""

    step: NDArray[np.float64]  # [points]
    """of a bucket: its first step"""
    mean: NDArray[np.float64]  # [points]
    low: NDArray[np.float64] | None  # [points]
    """None: every point is one step"""
    high: NDArray[np.float64] | None  # [points]
    not_finite: int
    """values that were NaN or infinite, which cannot be drawn"""


def curve(step: NDArray[np.float64], value: NDArray[np.float64], *, absent: NDArray[np.bool_]) -> Curve | None:
    """`absent`: rows that lack the metric. None when no value can be drawn and none is broken."""
    finite = np.isfinite(value)
    not_finite = int((~finite & ~absent).sum())
    step, value = step[finite], value[finite]
    if not len(step) and not not_finite:
        return None
    if len(step) <= MOST_POINTS:
        return Curve(step=step, mean=value, low=None, high=None, not_finite=not_finite)
    starts = np.unique(np.linspace(0, len(step), MOST_POINTS, endpoint=False).astype(np.int64))
    counts = np.diff(np.append(starts, len(step)))
    return Curve(
        step=step[starts],
        mean=np.add.reduceat(value / np.repeat(counts, counts), starts),  # the sum alone could overflow
        low=np.minimum.reduceat(value, starts),
        high=np.maximum.reduceat(value, starts),
        not_finite=not_finite,
    )
