"""Which rank runs which trajectories, in which micro-batch: pure, the same answer on every rank.

The cost of a trajectory is what its forward takes (the backward takes twice that): a linear term for the
matrices and a quadratic one for attention. The slowest rank sets the pace, so the largest sum is made small.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

Bins = list[list[int]]
"""indices, each once; every bin in rising order"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Multiplications and additions of a model's forward over one trajectory."""

    per_token: int
    """2 x elements of the layers' matrices"""
    per_policy_token: int
    """2 x elements of the head, which is used where a token is predicted only"""
    per_pair: int
    """of a token and one that it sees: 2 x layers x heads x head_dim for the score, as many for the value"""

    def of(self, tokens: int, policy_tokens: int) -> int:
        """Of a trajectory; each token sees itself and those before it."""
        pairs = tokens * (tokens + 1) // 2
        return self.per_token * tokens + self.per_policy_token * policy_tokens + self.per_pair * pairs


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
    """The largest sum of a bin."""
    return max(sum(costs[i] for i in one) for one in bins)


def to_the_lightest(costs: Sequence[int], order: Sequence[int], bins: int) -> Bins:
    """One after another into the bin with the smallest sum."""
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
    """Like `spread`, with at most `limit` of `sizes` in a bin (more where one alone is larger); heaviest bin
    first. None when the longest first do not fit."""
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
