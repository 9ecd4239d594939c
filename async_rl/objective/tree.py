"""Credit in groups whose answers fork from one another: a token that several answers go through is trained once, in the
answer that sampled it, with what all of them say about it.

Formulas: docs/algorithms.md#forks. Shapes: T policy tokens, I trajectories, G groups; float64. `Columns.forks` names
for each trajectory the one it goes on from, and how many of that one's policy tokens come before the fork. An answer
forks from an earlier one of its group, so going backwards every answer is met before the one it came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from async_rl.objective.tokens import Tokens


def path_mean(tokens: Tokens, advantage: Tensor) -> Tensor:
    """ARPO: each token's mean of the advantages [I] of the answers that go through it. [T]"""
    forks = _forks_of(tokens)
    if forks is None:
        return advantage[tokens.trajectory]
    counted = tokens.finite.tolist()
    total = [value if ok else 0.0 for value, ok in zip(advantage.tolist(), counted, strict=True)]
    number = [float(ok) for ok in counted]
    first = (tokens.length.cumsum(0) - tokens.length).long().tolist()
    places: list[int] = []
    sums: list[float] = []
    counts: list[float] = []
    parents, shares = (column.tolist() for column in forks)
    for child in range(len(parents) - 1, -1, -1):
        parent, shared = parents[child], shares[child]
        if parent < 0:
            continue
        # its own and its forks' advantages hold for the parent's tokens before the fork
        places += [first[parent], first[parent] + shared]
        sums += [total[child], -total[child]]
        counts += [number[child], -number[child]]
        total[parent] += total[child]
        number[parent] += number[child]
    place = torch.tensor(places, dtype=torch.int64, device=advantage.device)
    ends = advantage.new_zeros(2, tokens.num_tokens + 1)
    ends.index_add_(1, place, advantage.new_tensor([sums, counts]))
    through = ends.cumsum(1)[:, :-1]
    ok = tokens.finite[tokens.trajectory].double()
    return (advantage[tokens.trajectory] * ok + through[0]) / (ok + through[1]).clamp(min=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segments:
    """Pieces of answers between two forks, in the order of the answers and their tokens; all [segments]."""

    tokens: Tensor  # int64
    before: Tensor
    """value where it begins"""
    behind: Tensor
    begin: Tensor
    """value of the prompt"""
    ends: Tensor
    """answers that go through it and count"""


def segment_gain(tokens: Tokens, reward: Tensor) -> Tensor:
    """SPO: the value at the end of a token's segment minus the value at its beginning. reward [I] -> [T]

    Segments lie between forks. The value of a fork is the mean over the answer that goes on there and those that begin
    there, each with the value at the end of its next segment; the value of the prompt is that mean over the answers
    that begin with it; the value of an end is its reward. Answers that do not count are in no mean.
    """
    found = _segments(tokens, reward)
    gain = (found.behind - found.before).repeat_interleave(found.tokens)
    return torch.where(tokens.finite[tokens.trajectory], gain, 0.0)


def tree_gain(tokens: Tokens, reward: Tensor) -> Tensor:
    """TreeRL: the value behind a token's segment less that before it, plus the same less that of the prompt, both
    divided by the root of the number of answers that go through it. reward [I] -> [T]"""
    found = _segments(tokens, reward)
    gain = (2 * found.behind - found.before - found.begin) / found.ends.clamp(min=1.0).sqrt()
    return torch.where(tokens.finite[tokens.trajectory], gain.repeat_interleave(found.tokens), 0.0)


def root_of(tokens: Tokens) -> Tensor:
    """The answer from the prompt that each answer goes back to, its number in the batch: [I] int64."""
    forks = _forks_of(tokens)
    found = list(range(tokens.num_trajectories))
    if forks is not None:
        for number, parent in enumerate(forks[0].tolist()):
            if parent >= 0:
                found[number] = found[parent]
    return torch.tensor(found, dtype=torch.int64, device=tokens.group_of_trajectory.device)


def _segments(tokens: Tokens, reward: Tensor) -> _Segments:
    """Those of every answer. reward [I].

    A segment ends in a point: a place where others fork, or the end of its answer. Points are in the order of the
    answers and their tokens, so that the point before a point is the one where its segment begins. M places, F forks.
    """
    number = torch.arange(tokens.num_trajectories, device=reward.device)
    forks = _forks_of(tokens)
    parent, shared = forks if forks is not None else (torch.full_like(number, -1), torch.zeros_like(number))
    counted, length = tokens.finite.to(reward.dtype), tokens.length.long()
    fork = (parent >= 0).nonzero()[:, 0]
    stride = length.max() + 1 if len(length) else 1
    place, place_of_fork = torch.unique(parent[fork] * stride + shared[fork], return_inverse=True)  # [M], [F]
    owner = place // stride
    point = torch.arange(len(place), device=reward.device) + owner  # [M], behind the ends of the answers before
    last = torch.searchsorted(owner, number, right=True) + number  # [I], the point of each answer's end
    first = torch.zeros_like(last)
    first[1:] = last[:-1] + 1

    weight = counted[owner].index_add(0, place_of_fork, counted[fork]).clamp(min=1.0)
    value = reward.new_zeros(len(place) + len(number)).index_copy(0, last, reward)
    ends = torch.zeros_like(value).index_copy(0, last, counted)
    while True:  # each round is right one fork further up; a tree has as many as it is deep
        ahead = (value[point + 1] * counted[owner]).index_add(0, place_of_fork, value[first[fork]] * counted[fork])
        through = ends[point + 1].index_add(0, place_of_fork, ends[first[fork]])
        known, known_ends = value.index_copy(0, point, ahead / weight), ends.index_copy(0, point, through)
        if torch.equal(known, value) and torch.equal(known_ends, ends):
            break
        value, ends = known, known_ends

    root, group = parent < 0, tokens.group_of_trajectory
    roots = tokens.sum_group(counted * root).clamp(min=1.0)
    begin = (tokens.sum_group(value[first] * counted * root) / roots)[group]
    position = torch.zeros_like(ends, dtype=torch.int64).index_copy(0, last, length)
    position.index_copy_(0, point, place % stride)
    before, at = value.roll(1), position.roll(1)
    before[first], at[first] = begin, 0
    before[first[fork]] = value[point[place_of_fork]]
    answer = number.repeat_interleave(last - first + 1)
    return _Segments(tokens=position - at, before=before, behind=value, begin=begin[answer], ends=ends)


def _forks_of(tokens: Tokens) -> tuple[Tensor, Tensor] | None:
    """Of each answer: the trajectory that it goes on from, or -1, and the policy tokens of that one before the fork;
    two [I] int64. None: no fork."""
    forks = tokens.columns.forks
    if forks is None:
        return None
    parent, shared = forks.long().unbind(1)
    ok = (parent >= 0) & (parent < torch.arange(len(parent), device=parent.device))
    shared = torch.minimum(shared, tokens.length.long()[parent.clamp(min=0)])
    return torch.where(ok, parent, -1), torch.where(ok, shared, 0)
