"""From the rows that each rank computed to columns, gradients and norms of the whole batch, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from async_rl.batch import PackedBatch
from async_rl.trainer.ranks import Ranks
from async_rl_kernels import LogProbs

BUCKET_ELEMENTS = 1 << 25
"""of gradients summed up in one exchange"""


def whole_column(own: Tensor, batch: PackedBatch, ranks: Ranks) -> Tensor:  # [policy tokens, ...]
    """own: [own policy tokens, ...], without a graph"""
    share = batch.share
    if share is None:
        return own
    every = ranks.gather_rows(own, share.policy_of_rank)
    return torch.empty_like(every).index_copy_(0, share.every_policy, every)


def whole_log_probs(own: LogProbs, batch: PackedBatch, ranks: Ranks) -> LogProbs:
    """Columns of the batch from those of this rank; itself where this rank has the whole batch."""
    if batch.share is None:
        return own
    rows = torch.stack([own.log_prob.detach(), own.entropy.detach(), own.prob_square_sum], 1)
    log_prob, entropy, square = whole_column(rows, batch, ranks).T.contiguous()
    return LogProbs(log_prob=log_prob, entropy=entropy, prob_square_sum=square)


def whole_trajectories(own: Tensor, batch: PackedBatch, ranks: Ranks) -> Tensor:  # [trajectories]
    """own: [own trajectories]; 0 for those without policy tokens, which nobody runs"""
    share = batch.share
    if share is None:
        return own
    every = ranks.gather_rows(own, share.trajectories_of_rank)
    return every.new_zeros(batch.num_trajectories).index_copy_(0, share.every_trajectory, every)


def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Make `.grad` of parameters that every rank holds the sum over ranks; where a parameter has one on some
    rank, it gets one on all. Gradients of sharded parameters are summed where they are formed."""
    if ranks.mesh is None:
        return
    plain = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    held = ranks.sum_tensor(torch.tensor([float(p.grad is not None) for p in plain]))
    given = [p for p, count in zip(plain, held.tolist(), strict=True) if count]
    for bucket in _buckets(given):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        ranks.sum_tensor(flat)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all of them, each whole or sharded (then a collective)."""
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    if not sharded:
        return torch.nn.utils.get_total_norm(gradients)
    found = torch.nn.utils.get_total_norm(sharded)
    assert isinstance(found, DTensor)
    plain = [g for g in gradients if not isinstance(g, DTensor)]
    parts = [found.full_tensor(), *([torch.nn.utils.get_total_norm(plain)] if plain else [])]
    return torch.linalg.vector_norm(torch.stack(parts)) if plain else parts[0]


def clip_gradient(parameters: Sequence[nn.Parameter], limit: float, ranks: Ranks) -> float:
    """Global L2 norm of the gradient; scaled down to `limit` when that is above 0 and exceeded. The leader's
    norm, to the last bit, on every rank."""
    norm = ranks.broadcast_tensor(total_norm([p.grad for p in parameters if p.grad is not None]))
    if limit > 0:
        # apart: one operation over many tensors takes no mixture of both
        for sharded in (False, True):
            chosen = [p for p in parameters if isinstance(p, DTensor) == sharded]
            if chosen:
                torch.nn.utils.clip_grads_with_norm_(chosen, limit, norm)
    return float(norm)


def full(tensor: Tensor) -> Tensor:
    """A parameter or moment as one tensor; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one dtype and device."""
    bucket: list[nn.Parameter] = []
    filled = 0
    for parameter in parameters:
        first = bucket[0] if bucket else parameter
        alike = (first.dtype, first.device) == (parameter.dtype, parameter.device)
        if bucket and (not alike or filled + parameter.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += parameter.numel()
    if bucket:
        yield bucket
