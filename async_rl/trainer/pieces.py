"""Earlier pieces of episodes that a batch ends (`Earlier`): tokens on which the critic alone is trained.

An episode that is trained in pieces (`rollout.window`) has its reward in the last one. The critic learns returns, so it
learns them of the whole episode then, the tokens of earlier pieces included, which that piece was given (T-PPO); the
policy learned those tokens when their own piece was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.given import given_in

Batch = TypeVar("Batch")
"""what trajectories are packed into (trainer/packing.py, which knows this file)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier(Generic[Batch]):
    """The tokens that were given to the last pieces of a batch. E: their number."""

    batch: Batch
    """the same pieces, as if those tokens were their policy tokens"""
    first: Tensor  # [E] int64
    """row, in the columns of the batch itself, of the first token that the piece sampled"""
    distance: Tensor  # [E] int64
    """policy tokens from the token to that one"""

    def targets(self, target: Tensor, discount: float) -> Tensor:
        """Monte-Carlo returns of the tokens, [E]. target [T]: those of the batch itself."""
        return target[self.first] * discount ** self.distance.to(target.dtype)


def cut_among(ordered: Sequence[Trajectory], device: str | torch.device) -> Tensor:  # [I] bool
    """Which of the trajectories are pieces of episodes that go on."""
    return torch.tensor([t.ended == "window" for t in ordered], device=device)


def earlier_of(
    ordered: Sequence[Trajectory], pack: Callable[[Sequence[Trajectory]], Batch], device: str | torch.device
) -> Earlier[Batch] | None:
    """What was given to the pieces among these trajectories that end their episodes; None: nothing. `pack`: of
    trajectories, in this order."""
    chosen: list[Trajectory] = []
    first, distance = [], []
    row = 0
    for trajectory in ordered:
        own, given = trajectory.num_policy_tokens, given_in(trajectory)
        if own and given is not None and given.stretches and trajectory.ended != "window":
            chosen.append(_as_sampled(trajectory, given.stretches))
            length = chosen[-1].num_policy_tokens
            first.append(np.full(length, row, np.int64))
            distance.append(np.arange(length, 0, -1, dtype=np.int64))
        row += own
    if not chosen:
        return None
    return Earlier(
        batch=pack(chosen),
        first=torch.from_numpy(np.concatenate(first)).to(device),
        distance=torch.from_numpy(np.concatenate(distance)).to(device),
    )


def _as_sampled(trajectory: Trajectory, stretches: Sequence[tuple[int, int]]) -> Trajectory:
    """The trajectory with the turns that it was given in place of its own."""
    return replace(
        trajectory,
        turns=tuple(Turn(start=start, length=length) for start, length in stretches),
        versions=(VersionSpan(version=0, start=0, end=len(trajectory.tokens)),),
    )
