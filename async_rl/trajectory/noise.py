"""The noise that sampling takes: a function of (seed, position) alone, so that anybody can compute it again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: NDArray[np.uint64], position: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position), [rows]: SplitMix64 of both (Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014)."""
    state = _mix(seed + GOLDEN) + GOLDEN * (position.astype(np.uint64) + np.uint64(1))
    # 52 bits: u <= 1 - 2**-52, so that u * total never rounds up to total.
    return (_mix(state) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser of each number; same shape."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
