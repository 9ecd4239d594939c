"""Where a trajectory was forked from another one of its group (`fork_in`)."""

from __future__ import annotations

import re

from async_rl.trajectory.types import Trajectory

FORK = "rollout/fork"
"""key of `Trajectory.info`: the sample that it goes on from, and how many of the tokens that its policy sampled come
before the fork, e.g. `0@17`"""
_FORK = re.compile(r"(\d{1,9})@(\d{1,9})")


def fork_in(trajectory: Trajectory) -> tuple[int, int] | None:
    """(sample, policy tokens of that one before the fork); None: it begins with the prompt."""
    said = trajectory.info.get(FORK)
    found = _FORK.fullmatch(said) if isinstance(said, str) else None
    return (int(found[1]), int(found[2])) if found is not None else None
