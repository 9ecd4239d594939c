"""Batches for steps of a learner."""

from __future__ import annotations

import numpy as np

from async_rl.trajectory import Trajectory, Turn, VersionSpan


def episodes(step: int) -> list[Trajectory]:
    """Two groups of four, of one turn each, with made-up behaviour log-probs and rewards."""
    drawn = np.random.default_rng(step)
    return [
        Trajectory(
            group=2 * step + number // 4,
            sample=number % 4,
            problem=0,
            split="train",
            seed=0,
            tokens=drawn.integers(0, 10, 9).astype(np.int32),
            log_behaviour=drawn.uniform(-3.0, -1.0, 9).astype(np.float32),
            turns=(Turn(start=3, length=6),),
            versions=(VersionSpan(version=step, start=3, end=9),),
            reward=float(number % 2),
            ended="finished",
        )
        for number in range(8)
    ]
