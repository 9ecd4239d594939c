"""The part of a batch that each of several ranks runs through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from async_rl.batch.spread import Cost, fill, spread
from async_rl.trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a batch is laid over ranks."""

    rank: int
    size: int
    cost: Cost
    whole_groups: bool
    """whether the trajectories of a group stay on one rank: their gradients are compared there"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """Which rows of a batch's columns this rank computes, and where the rows of all ranks, laid end to end in
    the order of ranks, belong. Trajectories without policy tokens are nobody's."""

    trajectories: Tensor  # [own trajectories] int64
    policy: Tensor  # [own policy tokens] int64
    trajectories_of_rank: tuple[int, ...]
    """how many"""
    policy_of_rank: tuple[int, ...]
    """policy tokens"""
    every_trajectory: Tensor  # [trajectories of all ranks] int64
    every_policy: Tensor  # [policy tokens] int64
    groups_cut: bool
    """some group, on some rank, is spread over several micro-batches or ranks"""
    imbalance: float
    """cost of the busiest rank as a multiple of the mean"""


Plan = list[list[list[int]]]
"""for each rank, for each of its micro-batches, the trajectories: as many micro-batches on every rank, some empty"""


def plan(ordered: Sequence[Trajectory], over: Spread, limit: int) -> Plan:
    """Every trajectory that has policy tokens once, in micro-batches of at most `limit` tokens (a longer
    trajectory has one of its own). A group that fits one is not cut where groups stay whole."""
    sizes = [len(t.tokens) for t in ordered]
    costs = [over.cost.of(len(t.tokens), t.num_policy_tokens) for t in ordered]
    used = [i for i, t in enumerate(ordered) if t.num_policy_tokens]
    units = _groups(ordered, used) if over.whole_groups else [[i] for i in used]
    of_rank = spread([sum(costs[i] for i in unit) for unit in units], over.size)
    pieces = [_fitting([units[u] for u in chosen], sizes, limit) for chosen in of_rank]
    number = max(1, max(-(-sum(sizes[i] for piece in own for i in piece) // limit) for own in pieces))
    while True:
        filled = [
            fill([sum(costs[i] for i in p) for p in own], [sum(sizes[i] for i in p) for p in own], number, limit)
            for own in pieces
        ]
        made = [_micro_batches(f, own) for f, own in zip(filled, pieces, strict=True) if f is not None]
        if len(made) == over.size:
            return made
        number += 1  # ends: at the latest each piece has a micro-batch of its own


def share_of(made: Plan, ordered: Sequence[Trajectory], over: Spread, device: str | torch.device) -> Share:
    """What the plan means for columns."""
    lengths = torch.tensor([t.num_policy_tokens for t in ordered])
    starts = lengths.cumsum(0) - lengths
    of_rank = [list(chain.from_iterable(micro_batches)) for micro_batches in made]
    rows = [
        torch.cat([torch.arange(int(starts[i]), int(starts[i] + lengths[i])) for i in own])
        if own
        else torch.zeros(0, dtype=torch.int64)
        for own in of_rank
    ]
    work = [sum(over.cost.of(len(ordered[i].tokens), ordered[i].num_policy_tokens) for i in own) for own in of_rank]
    return Share(
        trajectories=torch.tensor(of_rank[over.rank], dtype=torch.int64, device=device),
        policy=rows[over.rank].to(device),
        trajectories_of_rank=tuple(map(len, of_rank)),
        policy_of_rank=tuple(map(len, rows)),
        every_trajectory=torch.tensor(list(chain.from_iterable(of_rank)), dtype=torch.int64, device=device),
        every_policy=torch.cat(rows).to(device),
        groups_cut=_cuts_a_group(made, ordered),
        imbalance=max(work) * over.size / sum(work) if sum(work) else 1.0,
    )


def _groups(ordered: Sequence[Trajectory], used: Sequence[int]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for i in used:
        found.setdefault(ordered[i].group, []).append(i)
    return list(found.values())


def _fitting(units: Sequence[list[int]], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Units that fit a micro-batch as they are, the others trajectory by trajectory."""
    pieces: list[list[int]] = []
    for unit in units:
        pieces += [unit] if sum(sizes[i] for i in unit) <= limit else [[i] for i in unit]
    return pieces


def _micro_batches(filled: Sequence[Sequence[int]], pieces: Sequence[list[int]]) -> list[list[int]]:
    return [sorted(chain.from_iterable(pieces[p] for p in one)) for one in filled]


def _cuts_a_group(made: Plan, ordered: Sequence[Trajectory]) -> bool:
    seen: set[int] = set()
    for micro_batch in chain.from_iterable(made):
        groups = {ordered[i].group for i in micro_batch}
        if groups & seen:
            return True
        seen |= groups
    return False
