"""How the trajectories of a batch hang together (settings.rollout), as columns of the objective."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from async_rl.trajectory import Trajectory
from async_rl.trajectory.forks import fork_in
from async_rl.trajectory.given import given_in
from async_rl.trajectory.types import GREEDY


def forks_among(ordered: Sequence[Trajectory], device: str | torch.device) -> Tensor | None:
    """`objective.Columns.forks` of trajectories in the order of their batch, [I, 2] int64; None: none is a fork. One
    whose parent is not in the batch (it failed), or was lost and is there as it was sampled once more, counts as begun
    with the prompt."""
    place = {(t.group, t.sample): i for i, t in enumerate(ordered)}
    rows = []
    for trajectory in ordered:
        fork = fork_in(trajectory)
        parent = -1 if fork is None else place.get((trajectory.group, fork[0]), -1)
        if fork is None or parent < 0 or not _went_on(trajectory, ordered[parent], fork[1]):
            rows.append((-1, 0))
        else:
            rows.append((parent, fork[1]))
    if all(parent < 0 for parent, _ in rows):
        return None
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _went_on(trajectory: Trajectory, parent: Trajectory, shared: int) -> bool:
    """Whether what was given to `trajectory` is the beginning of `parent`, with so many tokens of its policy."""
    given = given_in(trajectory)
    if given is None or not given.stretches:
        return False
    end = sum(given.stretches[-1])
    first = parent.contexts[0] if parent.contexts else len(parent.tokens)
    own = sum(max(0, min(turn.start + turn.length, end, first) - turn.start) for turn in parent.turns)
    return own == shared and end <= first and np.array_equal(trajectory.tokens[:end], parent.tokens[:end])


def greedy_among(ordered: Sequence[Trajectory], device: str | torch.device) -> Tensor | None:
    """Which of them were sampled greedily, [I] bool; None: none was."""
    found = [bool(t.turns) and all(turn.temperature == GREEDY for turn in t.turns) for t in ordered]
    return torch.tensor(found, device=device) if any(found) else None
