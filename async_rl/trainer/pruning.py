"""Trajectories that are left out before the forward pass because their advantage is small (CPPO).

Advantages of whole trajectories follow from rewards alone. Who is left out keeps its place and its reward in the batch,
with which the others are compared, and loses its tokens: no rank runs it, and it is in no denominator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from msgspec.structs import replace

from async_rl.objective import Columns
from async_rl.objective.pruning import small_advantages
from async_rl.objective.recipe import Recipe, Requirements
from async_rl.trainer.noted import noted_columns
from async_rl.trajectory import Trajectory


def pruned(
    trajectories: Sequence[Trajectory], recipe: Recipe, needs: Requirements, weights: Mapping[str, float]
) -> list[Trajectory]:
    """The trajectories by group and sample, those without their tokens that `select.before_forward` leaves out.
    weights: of the parts of rewards."""
    ordered = sorted(trajectories, key=lambda t: (t.group, t.sample))
    small = small_advantages(_columns(ordered, needs, weights), recipe).tolist()
    return [_silent(t) if left_out else t for t, left_out in zip(ordered, small, strict=True)]


def _silent(trajectory: Trajectory) -> Trajectory:
    """A trajectory without its tokens, but the first."""
    return replace(
        trajectory,
        tokens=trajectory.tokens[:1],
        log_behaviour=np.zeros(1, np.float32),
        turns=(),
        versions=(),
        contexts=(),
    )


def _columns(ordered: Sequence[Trajectory], needs: Requirements, weights: Mapping[str, float]) -> Columns:
    """Each trajectory as one turn of as many tokens as it has, without log-probs."""
    lengths = torch.tensor([t.num_policy_tokens for t in ordered])
    owner = torch.arange(len(ordered)).repeat_interleave(lengths)
    zeros = torch.zeros(len(owner), dtype=torch.float64)
    groups = np.unique([t.group for t in ordered], return_inverse=True)[1]
    return Columns(
        log_prob=zeros,
        log_behaviour=zeros,
        version=torch.zeros(len(owner), dtype=torch.int64),
        turn_of_token=owner,
        trajectory_of_turn=torch.arange(len(ordered)),
        group_of_trajectory=torch.as_tensor(groups),
        reward=torch.tensor([t.reward for t in ordered], dtype=torch.float32).double(),  # as the trained batch has them
        turn_reward=torch.zeros(len(ordered), dtype=torch.float64),
        state_key=torch.full((len(ordered),), -1),
        truncated=torch.tensor([t.ended in ("length", "turn_limit") for t in ordered]),
        noted=noted_columns(ordered, needs, weights, "cpu"),
        current_version=0,
    )
