"""How ranks share a batch: which trajectories each runs, in which micro-batches, and what that costs.

The division of work (`plan`) is pure: every rank finds the same. Sizes and costs count the rows that are computed: of a
prefix that trajectories of a group share (model/prefix_tree.py), one copy in each micro-batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from async_rl.model.prefix_tree import common_beginning
from async_rl.trajectory import Trajectory

Bins = list[list[int]]
"""indices, each once; every bin in rising order"""
Plan = list[list[list[int]]]
"""for each rank, for each of its micro-batches, the trajectories: as many micro-batches on every rank, some empty"""
Reach = Literal["micro_batch", "round", "rounds"]
"""how far a group reaches: one micro-batch has all of it; those of one number, of all ranks, together have; or more"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a batch is laid over ranks."""

    rank: int
    size: int
    cost: Cost
    whole_groups: bool
    """whether the trajectories of a group stay together, as their gradients are compared: on one rank or, where a group
    is longer than a micro-batch, in micro-batches that the ranks run at the same time"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """Which rows of a batch's columns this rank computes, and where the rows of all ranks belong.

    `every_*` map rows of all ranks, one rank behind the other, to rows of the batch. Trajectories without policy tokens
    are run by no rank.
    """

    trajectories: Tensor  # [own trajectories] int64
    policy: Tensor  # [own policy tokens] int64
    trajectories_of_rank: tuple[int, ...]
    """trajectories of each rank"""
    policy_of_rank: tuple[int, ...]
    """policy tokens of each rank"""
    every_trajectory: Tensor  # [trajectories of all ranks] int64
    every_policy: Tensor  # [policy tokens] int64
    reach: tuple[Reach, ...]
    """of the groups in the micro-batches of each number: the farthest"""
    imbalance: float
    """cost of the busiest rank as a multiple of the mean"""

    @property
    def groups_cut(self) -> bool:
        """Whether some group is spread over several micro-batches or ranks."""
        return any(reach != "micro_batch" for reach in self.reach)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Multiplications and additions of a model's forward over one trajectory (the backward takes twice as many).

    A term linear in the tokens for the matrices, and a quadratic one for attention.
    """

    per_token: int
    """2 x elements of the layers' matrices"""
    per_policy_token: int
    """2 x elements of the head, which is used where a token is predicted only"""
    per_pair: int
    """of a token and one that it sees: 2 x layers x heads x head_dim for the score, as many for the value"""

    def of(self, tokens: int, policy_tokens: int) -> int:
        """The cost of a trajectory of one context; each token sees itself and those before it."""
        pairs = tokens * (tokens + 1) // 2
        return self.per_token * tokens + self.per_policy_token * policy_tokens + self.per_pair * pairs

    def of_trajectory(self, trajectory: Trajectory) -> int:
        """The cost of a trajectory; contexts do not see each other."""
        contexts = sum(self.of(tokens, 0) for tokens in trajectory.context_lengths())
        return contexts + self.of(0, trajectory.num_policy_tokens)


class Sizes:
    """Rows and costs of sets of trajectories that go through the model together.

    prefix [trajectories]: tokens with which the first context of every trajectory of the group begins, counted once in
    each set.
    """

    def __init__(self, ordered: Sequence[Trajectory], *, shared: bool = False) -> None:
        self.shared = shared
        self.groups = [t.group for t in ordered]
        self.tokens = [len(t.tokens) for t in ordered]
        self.prefix = _prefixes(ordered) if shared else [0] * len(ordered)
        self._ordered = ordered

    def rows(self, chosen: Sequence[int]) -> int:
        """Most rows that the trajectories `chosen` are computed in."""
        return sum(self.tokens[i] for i in chosen) - sum(self.prefix[i] for i in self._repeated(chosen))

    def cost(self, chosen: Sequence[int], cost: Cost) -> int:
        """What the trajectories `chosen` cost."""
        whole = sum(cost.of_trajectory(self._ordered[i]) for i in chosen)
        return whole - sum(cost.of(self.prefix[i], 0) for i in self._repeated(chosen))

    def _repeated(self, chosen: Sequence[int]) -> list[int]:
        """Those that are not the first of their group."""
        first: dict[int, int] = {}
        return [i for i in chosen if first.setdefault(self.groups[i], i) != i]


def _prefixes(ordered: Sequence[Trajectory]) -> list[int]:
    """`Sizes.prefix` of trajectories."""
    first: dict[int, list[NDArray[np.int32]]] = {}
    for t in ordered:
        first.setdefault(t.group, []).append(t.tokens[: t.context_lengths()[0]])
    of_group = {group: common_beginning(documents) for group, documents in first.items()}
    return [of_group[t.group] for t in ordered]


def plan(ordered: Sequence[Trajectory], over: Spread, limit: int, sizes: Sizes | None = None) -> Plan:
    """Every trajectory that has policy tokens once, in micro-batches of at most `limit` rows.

    A longer trajectory has a micro-batch of its own. Where groups stay whole, each is in one micro-batch if all fit
    one, else in one round (`_in_rounds`). Where a prefix is shared, groups are cut into as many parts as make the
    busiest rank's work least, since each part computes the prefix. `sizes`: None counts every token.
    """
    sizes = sizes or Sizes(ordered)
    used = [i for i, t in enumerate(ordered) if t.num_policy_tokens]
    best: tuple[int, list[list[list[int]]]] | None = None
    for units in _units(sizes, used, whole_groups=over.whole_groups):
        costs = [sizes.cost(unit, over.cost) for unit in units]
        of_rank = spread(costs, over.size)
        busiest = largest(of_rank, costs)
        if best is None or busiest < best[0]:
            best = busiest, [[units[u] for u in chosen] for chosen in of_rank]
    assert best is not None
    if over.whole_groups and any(sizes.rows(unit) > limit and len(unit) > 1 for own in best[1] for unit in own):
        return _in_rounds(list(chain.from_iterable(best[1])), sizes, over, limit)
    pieces = [_fitting(units, sizes, limit) for units in best[1]]
    rows = [[sizes.rows(piece) for piece in own] for own in pieces]
    costs_of = [[sizes.cost(piece, over.cost) for piece in own] for own in pieces]
    number = max(1, max(-(-sum(own) // limit) for own in rows))
    while True:
        filled = [fill(c, r, number, limit) for c, r in zip(costs_of, rows, strict=True)]
        made = [_micro_batches(f, own) for f, own in zip(filled, pieces, strict=True) if f is not None]
        if len(made) == over.size:
            return made
        number += 1  # ends: at the latest each piece has a micro-batch of its own


def cuts(sizes: Sizes, limit: int) -> list[int]:
    """Where the micro-batches of one rank begin, and the end, all trajectories in order.

    A group that fits one micro-batch is not cut: an exact baseline then needs no second gradient sum for it.
    """
    number = len(sizes.tokens)
    members: dict[int, list[int]] = {}
    for i in range(number):
        members.setdefault(sizes.groups[i], []).append(i)
    of_group = {group: sizes.rows(every) for group, every in members.items()}
    found = [0]
    filled = 0
    for i in range(number):
        begins = i == 0 or sizes.groups[i - 1] != sizes.groups[i]
        added = sizes.tokens[i] - (0 if begins else sizes.prefix[i])
        whole = of_group[sizes.groups[i]] if begins else 0
        if filled and filled + max(whole if whole <= limit else 0, added) > limit:
            found.append(i)
            filled, added = 0, sizes.tokens[i]
        filled += added
    return [*found, number]


def share_of(
    made: Plan, ordered: Sequence[Trajectory], over: Spread, device: str | torch.device, sizes: Sizes | None = None
) -> Share:
    """What the plan means for the columns of this rank (`over.rank`)."""
    sizes = sizes or Sizes(ordered)
    lengths = torch.tensor([t.num_policy_tokens for t in ordered])
    starts = lengths.cumsum(0) - lengths
    of_rank = [list(chain.from_iterable(micro_batches)) for micro_batches in made]
    rows = [
        torch.cat([torch.arange(int(starts[i]), int(starts[i] + lengths[i])) for i in own])
        if own
        else torch.zeros(0, dtype=torch.int64)
        for own in of_rank
    ]
    work = [sum(sizes.cost(micro, over.cost) for micro in micro_batches) for micro_batches in made]
    return Share(
        trajectories=torch.tensor(of_rank[over.rank], dtype=torch.int64, device=device),
        policy=rows[over.rank].to(device),
        trajectories_of_rank=tuple(map(len, of_rank)),
        policy_of_rank=tuple(map(len, rows)),
        every_trajectory=torch.tensor(list(chain.from_iterable(of_rank)), dtype=torch.int64, device=device),
        every_policy=torch.cat(rows).to(device),
        reach=reaches(made, [t.group for t in ordered]),
        imbalance=max(work) * over.size / sum(work) if sum(work) else 1.0,
    )


def _units(sizes: Sizes, used: Sequence[int], *, whole_groups: bool) -> Iterator[list[list[int]]]:
    """Ways of cutting the trajectories `used` into units that stay on one rank."""
    groups: dict[int, list[int]] = {}
    for i in used:
        groups.setdefault(sizes.groups[i], []).append(i)
    if whole_groups or not used:
        yield list(groups.values())
        return
    size = max(map(len, groups.values())) if any(sizes.prefix) else 1
    while size > 1:
        yield [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]
        size = (size + 1) // 2
    yield [[i] for i in used]


def _fitting(units: Sequence[list[int]], sizes: Sizes, limit: int) -> list[list[int]]:
    """Units that fit a micro-batch as they are, the others in parts that do: those that share a prefix as large as can
    be, else trajectory by trajectory."""
    pieces: list[list[int]] = []
    for unit in units:
        if sizes.rows(unit) <= limit:
            pieces.append(unit)
            continue
        part: list[int] = []
        for i in unit:
            if part and (not sizes.prefix[i] or sizes.rows([*part, i]) > limit):
                pieces.append(part)
                part = []
            part.append(i)
        pieces.append(part)
    return pieces


def _micro_batches(filled: Sequence[Sequence[int]], pieces: Sequence[list[int]]) -> list[list[int]]:
    """Bins of pieces -> bins of trajectories."""
    return [sorted(chain.from_iterable(pieces[p] for p in one)) for one in filled]


def reaches(made: Plan, groups: Sequence[int]) -> tuple[Reach, ...]:
    """`Share.reach` of a plan. groups: of each trajectory."""
    places: dict[int, set[tuple[int, int]]] = {}
    for rank, micro_batches in enumerate(made):
        for number, one in enumerate(micro_batches):
            for i in one:
                places.setdefault(groups[i], set()).add((number, rank))
    found: list[Reach] = ["micro_batch"] * len(made[0])
    for held in places.values():
        numbers = {number for number, _ in held}
        if len(numbers) > 1:
            for number in numbers:
                found[number] = "rounds"
        elif len(held) > 1 and found[min(numbers)] == "micro_batch":
            found[min(numbers)] = "round"
    return tuple(found)


# Rounds: one micro-batch of each rank, run at the same time.


def _in_rounds(groups: Sequence[list[int]], sizes: Sizes, over: Spread, limit: int) -> Plan:
    """Micro-batches so that each of `groups` that fits one round is in one: what is found of its trajectories on all
    ranks is then known at the end of the round. The trajectories of longer groups have the last rounds to themselves.
    """
    costs = {i: sizes.cost([i], over.cost) for group in groups for i in group}
    fitting = [_round(group, costs, sizes, over.size, limit) is not None for group in groups]
    units = [group for group, fits in zip(groups, fitting, strict=True) if fits]
    longer = [i for group, fits in zip(groups, fitting, strict=True) if not fits for i in group]
    rounds = _rounds_of(units, costs, sizes, over.size, limit)
    if longer:
        rows, number = [sizes.rows([i]) for i in longer], 1
        while (bins := fill([costs[i] for i in longer], rows, number * over.size, limit)) is None:
            number += 1
        of_bins = [[longer[i] for i in one] for one in bins]
        rounds += [of_bins[at : at + over.size] for at in range(0, len(of_bins), over.size)]
    made: Plan = [[] for _ in range(over.size)]
    done = [0] * over.size
    for one in rounds:  # the heaviest to the rank that had least so far
        heaviest_first = sorted(one, key=lambda chosen: -sum(costs[i] for i in chosen))
        for rank, chosen in zip(sorted(range(over.size), key=lambda r: done[r]), heaviest_first, strict=True):
            made[rank].append(sorted(chosen))
            done[rank] += sum(costs[i] for i in chosen)
    return made


def _rounds_of(
    units: Sequence[list[int]], costs: dict[int, int], sizes: Sizes, ranks: int, limit: int
) -> list[list[list[int]]]:
    """Rounds of whole units, each of which fits a round: for each round, for each rank, the trajectories."""
    if not units:
        return []
    rows = [sum(sizes.rows([i]) for i in unit) for unit in units]
    work = [sum(costs[i] for i in unit) for unit in units]
    for number in range(max(1, -(-sum(rows) // (ranks * limit))), len(units)):
        filled = fill(work, rows, number, ranks * limit) or []
        laid = [_round([i for u in one for i in units[u]], costs, sizes, ranks, limit) for one in filled]
        made = [one for one in laid if one is not None]
        if len(made) == number:
            return made
    laid = [_round(unit, costs, sizes, ranks, limit) for unit in units]
    return [one for one in laid if one is not None]


def _round(
    chosen: Sequence[int], costs: dict[int, int], sizes: Sizes, ranks: int, limit: int
) -> list[list[int]] | None:
    """The trajectories `chosen` laid over the ranks, a micro-batch each; None when they do not fit."""
    filled = fill([costs[i] for i in chosen], [sizes.rows([i]) for i in chosen], ranks, limit)
    return None if filled is None else [[chosen[i] for i in one] for one in filled]


# Bins of nearly equal cost. The slowest rank sets the pace, so the largest sum is made small.


def spread(costs: Sequence[int], bins: int) -> Bins:
    """Indices of `costs` in `bins` bins (some may stay empty) with a small largest sum.

    The best of three: Karmarkar and Karp's differencing, the longest first, and each in order to the bin
    that has least. Costs are not negative.
    """
    longest_first = sorted(range(len(costs)), key=lambda i: -costs[i])
    candidates = (
        differencing(costs, bins),
        to_the_lightest(costs, longest_first, bins),
        to_the_lightest(costs, range(len(costs)), bins),
    )
    return min(candidates, key=lambda found: largest(found, costs))


def largest(bins: Bins, costs: Sequence[int]) -> int:
    """The largest sum of costs in a bin."""
    return max(sum(costs[i] for i in one) for one in bins)


def to_the_lightest(costs: Sequence[int], order: Sequence[int], bins: int) -> Bins:
    """Put the indices, in this order, each into the bin that has the smallest sum then."""
    found: Bins = [[] for _ in range(bins)]
    sums = [(0, number) for number in range(bins)]
    for i in order:
        total, number = sums[0]
        found[number].append(i)
        heapq.heapreplace(sums, (total + costs[i], number))
    return [sorted(one) for one in found]


def differencing(costs: Sequence[int], bins: int) -> Bins:
    """Karmarkar and Karp (1982) for several bins: the two partial answers of the largest spread are joined,
    the heaviest bins of one with the lightest of the other, until one is left."""
    if not costs:
        return [[] for _ in range(bins)]
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for i, cost in enumerate(costs):
        part: list[tuple[int, list[int]]] = [(0, []) for _ in range(bins - 1)] + [(cost, [i])]
        heap.append((part[0][0] - cost, i, part))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, number, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        joined = [(a + b, [*left, *right]) for (a, left), (b, right) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda part: part[0])
        heapq.heappush(heap, (joined[0][0] - joined[-1][0], number, joined))
    return sorted(sorted(members) for _, members in heap[0][2])


def fill(costs: Sequence[int], sizes: Sequence[int], bins: int, limit: int) -> Bins | None:
    """Like `spread`, with at most `limit` of `sizes` in a bin (more where one alone is larger); heaviest bin first.

    None when they do not fit, put in by falling size.
    """
    found: Bins = [[] for _ in range(bins)]
    sums, filled = [0] * bins, [0] * bins
    for i in sorted(range(len(costs)), key=lambda i: (-sizes[i], -costs[i])):
        room = [n for n in range(bins) if not found[n] or filled[n] + sizes[i] <= limit]
        if not room:
            return None
        chosen = min(room, key=lambda n: sums[n])
        found[chosen].append(i)
        sums[chosen] += costs[i]
        filled[chosen] += sizes[i]
    heaviest_first = sorted(range(bins), key=lambda n: -sums[n])
    return [sorted(found[n]) for n in heaviest_first]
