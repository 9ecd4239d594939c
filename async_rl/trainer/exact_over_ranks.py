"""Exact OPOB where a batch is laid over ranks (trajectory_gradient.py says what is computed).

The norm of a trajectory is found on the rank that holds it. Where every group lies in one micro-batch, its
baseline is known there and each micro-batch is done with at once. Otherwise (a group longer than a micro-batch,
or one baseline for the whole batch in several micro-batches) norms come first and every micro-batch is run a
second time: the sums that one rank keeps beside the gradient would here be one more gradient on every rank,
and, with sharded weights, could not be kept apart by group.

Weight gradients formed from hooks are not seen by FSDP: each is formed whole, one weight at a time, and summed
over the ranks into their rows of `.grad` before the next. The largest, of the embedding or the head, is the
most memory that it takes: vocabulary x hidden x 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from async_rl.batch import MicroBatch, PackedBatch
from async_rl.trainer.trajectory_gradient import TrajectoryGradient, proportion
from async_rl.trainer.whole import whole_trajectories

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
    """`TrajectoryGradient.add` for this rank's share; arguments and result are of the whole batch. Collective.

    With whole weights on every rank `.grad` is that of the share, still to be summed over ranks; with sharded
    ones it is the batch's.
    """
    share = batch.share
    assert share is not None
    baseline = batch.own(baseline)
    reward = proportion(batch.own(policy), baseline, batch)
    group = batch.group_of_trajectory[share.trajectories]
    own = torch.zeros(len(group), dtype=torch.float64, device=reward.device)

    def multipliers(micro: MicroBatch, whole: Tensor) -> Tensor:
        if micro.idle:
            return reward.new_zeros(1)
        return (reward - baselines(whole)[group].to(reward))[micro.trajectories]

    at_once = scope == "group" and not share.groups_cut
    for micro in batch.micro_batches:
        found = exact.norms(micro, micro.rows(baseline))
        if not micro.idle:
            own[micro.trajectories] = found
        if at_once:
            whole = own.new_zeros(batch.num_trajectories).index_copy_(0, share.trajectories, own)
            exact.accumulate(multipliers(micro, whole))
            exact.forget()
    whole = whole_trajectories(own, batch, ranks)
    if not at_once:
        for micro in batch.micro_batches:
            if len(batch.micro_batches) > 1:
                exact.norms(micro, micro.rows(baseline))
            exact.accumulate(multipliers(micro, whole))
            exact.forget()
    return whole
