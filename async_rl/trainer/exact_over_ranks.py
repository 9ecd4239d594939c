"""Exact OPOB where ranks share a batch: `TrajectoryGradient.add` over ranks.

The norm of a trajectory is found on the rank that runs it, and the baseline of a group needs the norms of all of its
trajectories. How far they are apart (`Share.reach`) says when it is known:

- in one micro-batch: at once, and without a word to other ranks;
- in one round, the micro-batches that all ranks run at the same time: when the ranks have told each other its norms,
  I numbers;
- in several rounds, which only a group longer than a round is: at the end of all. Its micro-batches are run a second
  time, as an ordinary step is: the coefficient of every token is known then.

One baseline for the whole batch is known at its end. A copy of the gradient that is kept until then, as on one rank,
would be one more on every rank and, with sharded weights, could not be kept apart by group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from async_rl.trainer.packing import MicroBatch, PackedBatch
from async_rl.trainer.ranks import whole_trajectories
from async_rl.trainer.shares import Reach
from async_rl.trainer.trajectory_gradient import TrajectoryGradient, proportion

if TYPE_CHECKING:
    from async_rl.trainer.ranks import Ranks


def add_over_ranks(
    exact: TrajectoryGradient,
    batch: PackedBatch,
    policy: Tensor,
    baseline: Tensor,
    baselines: Callable[[Tensor], Tensor],
    ranks: Ranks,
    *,
    scope: Literal["group", "batch"],
) -> Tensor:
    """`TrajectoryGradient.add` for this rank's share; arguments [T] and result [I] are of the whole batch. Collective.

    With whole weights on every rank `.grad` is that of the share, not yet summed over ranks; with sharded weights it is
    that of the batch.
    """
    share = batch.share
    assert share is not None
    baseline = batch.own(baseline)
    reward = proportion(batch.own(policy), baseline, batch)
    group = batch.group_of_trajectory[share.trajectories]
    own = torch.zeros(len(group), dtype=torch.float64, device=reward.device)

    def multipliers(micro: MicroBatch, whole: Tensor) -> Tensor:  # [I of the batch] -> [i]
        if micro.idle:
            return reward.new_zeros(1)
        return (reward - baselines(whole)[group].to(reward))[micro.trajectories]

    reach = share.reach if scope == "group" else _of_one_baseline(len(batch.micro_batches))
    later: list[MicroBatch] = []
    for micro, far in zip(batch.micro_batches, reach, strict=True):
        found = exact.norms(micro, micro.rows(baseline))
        if not micro.idle:
            own[micro.trajectories] = found
        if far == "rounds":
            later.append(micro)
        else:
            chosen = share.trajectories[micro.trajectories]
            known = own.new_zeros(batch.num_trajectories).index_copy_(0, chosen, own[micro.trajectories])
            exact.accumulate(multipliers(micro, ranks.sum_tensor(known) if far == "round" else known))
        exact.forget()
    whole = whole_trajectories(own, batch, ranks)
    for micro in later:
        of_token = multipliers(micro, whole)[micro.owners()]
        exact.add_known(micro, of_token * micro.rows(baseline))
    return whole


def _of_one_baseline(micro_batches: int) -> tuple[Reach, ...]:
    """`Share.reach` where every trajectory counts for one baseline."""
    far: Reach = "round" if micro_batches == 1 else "rounds"
    return (far,) * micro_batches
