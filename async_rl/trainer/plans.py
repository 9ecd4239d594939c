"""How the trajectories of a batch hang together (settings.rollout), as columns of the objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from async_rl.trajectory import Trajectory
from async_rl.trajectory.forks import fork_in
from async_rl.trajectory.types import GREEDY


def forks_among(ordered: Sequence[Trajectory], device: str | torch.device) -> Tensor | None:
    """`objective.Columns.forks` of trajectories in the order of their batch, [I, 2] int64; None: none is a fork. One
    whose parent is not in the batch (it failed) counts as begun with the prompt."""
    place = {(t.group, t.sample): i for i, t in enumerate(ordered)}
    rows = []
    for trajectory in ordered:
        fork = fork_in(trajectory)
        parent = -1 if fork is None else place.get((trajectory.group, fork[0]), -1)
        rows.append((parent, fork[1] if fork is not None and parent >= 0 else 0))
    if all(parent < 0 for parent, _ in rows):
        return None
    return torch.tensor(rows, dtype=torch.int64, device=device)


def greedy_among(ordered: Sequence[Trajectory], device: str | torch.device) -> Tensor | None:
    """Which of them were sampled greedily, [I] bool; None: none was."""
    found = [bool(t.turns) and all(turn.temperature == GREEDY for turn in t.turns) for t in ordered]
    return torch.tensor(found, device=device) if any(found) else None
