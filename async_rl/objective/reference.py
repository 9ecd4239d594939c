"""The calibrated reference of the ESS: what fresh data say about the engine's noise, and what they said at first.

Fresh tokens were sampled by the very weights about to be updated, so their log-ratio is what engine and trainer
disagree about and nothing else. Two records of it are kept by length: a fading one of the newest data (`fresh`), and
one of the run's first data (`begun`). The reference follows the first and is held by the second: data that were
corrupted look like noise, and a reference that believed them would give them the full learning rate.

Formulas: docs/algorithms.md#ess-reference. Noise is in nats per square root of a token, because independent errors of
L tokens add up to a spread like sqrt(L).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from math import log
from statistics import NormalDist

import torch
from torch import Tensor

from async_rl.objective.axes import EssSettings, Pool
from async_rl.objective.state import FreshNoise, ObjectiveState
from async_rl.objective.trust import LENGTH_BUCKETS, length_bucket

BUCKETS = len(LENGTH_BUCKETS) + 1
DECADES = (-4, 2)
"""powers of ten between which noise is told apart, nats per square root of a token"""
PER_DECADE = 16
HALF_WITHIN = NormalDist().inv_cdf(0.75)
"""standard deviations around its median within which half of a normal distribution lies"""

MIN_FRESH = 8.0
"""fresh units in a length bucket before its own noise is believed; below, that of all buckets"""
BEGINNING = 256.0
"""fresh units that say how a run began"""
LARGEST_NOISE = 0.3
"""nats per square root of a token: what a run may begin with. Engines in 16 bit differ by some .03, in 8 bit by .1"""
GROWTH = 4.0
"""how many times the variance of the run's start is still no sign of corruption: an estimate from some dozens of units
errs by a third, and noise changes with the entropy"""


def _edges() -> tuple[float, ...]:
    low, high = DECADES
    positive = [10 ** (low + i / PER_DECADE) for i in range((high - low) * PER_DECADE + 1)]
    return (*(-edge for edge in reversed(positive)), *positive)


EDGES = _edges()
"""of the bins; what lies beyond is counted in the outermost ones"""


def learn(total: Tensor, length: Tensor, settings: EssSettings, state: ObjectiveState) -> tuple[float, ObjectiveState]:
    """The noise of these fresh units as a share of what the run's start allows, and the state that has learnt them.

    total: their summed log-ratios [units], nats; length: their tokens [units], all above 0; float64. The first record
    takes no data whose noise is beyond the allowed: they are no beginning to go by.
    """
    noise = total / length.sqrt()
    spread = _share_of_allowed(noise, length, settings.pool, state.begun)
    now = _counts(noise, length)
    fresh = tuple(
        _faded(old, settings.decay).plus(new) if new.count else old
        for old, new in zip(state.fresh or (FreshNoise(),) * BUCKETS, now, strict=True)
    )
    begun = state.begun or (FreshNoise(),) * BUCKETS
    if sum(record.count for record in begun) < BEGINNING and spread < 1:
        begun = tuple(old.plus(new) for old, new in zip(begun, now, strict=True))
    return spread, replace(state, fresh=fresh, begun=begun)


def fresh_ratio(length: Tensor, pool: Pool, state: ObjectiveState) -> float:
    """rho of fresh data as the newest ones are, with these unit lengths [units]; 1 before there are any."""
    noise = _noise_by_bucket(state.fresh)
    return 1.0 if noise is None else _expected_ratio(noise, length, pool)


def begun_ratio(length: Tensor, pool: Pool, state: ObjectiveState) -> float:
    """rho of fresh data as the run's first ones were, with these unit lengths [units]."""
    return _expected_ratio(_begun_noise(state.begun), length, pool)


def _expected_ratio(noise: Sequence[float], length: Tensor, pool: Pool) -> float:
    """rho of log-normal weights with E[w] = 1, so that E[w^2] = exp(var log w). noise: by bucket; length [units]."""
    if not len(length):
        return 1.0
    variance = length.new_tensor(noise)[length_bucket(length)] * length
    if pool == "mean":
        variance = variance / length.square()
    return float((log(len(length)) - torch.logsumexp(variance, 0)).exp())


def _share_of_allowed(noise: Tensor, length: Tensor, pool: Pool, begun: tuple[FreshNoise, ...]) -> float:
    """Variance of the units' log-weights around that of the run's start, as a share of the allowed one.

    Allowed: GROWTH times the variance of the run's start at that length, or half of its rho where that is more. noise,
    length [units].
    """
    bucket = length_bucket(length)
    known = _begun_noise(begun) if any(record.count for record in begun) else [LARGEST_NOISE**2] * BUCKETS
    first = length.new_tensor(known)[bucket]
    centre = length.new_tensor([_centre_and_variance(record)[0] if record.count else 0.0 for record in begun] or
                               [0.0] * BUCKETS)[bucket]  # fmt: skip
    half = log(2) * (length.square() if pool == "mean" else torch.ones_like(length))
    allowed = torch.maximum(GROWTH * first * length, first * length + half)
    middle = ((noise - centre).square() * length / allowed).median()
    return float(middle) / HALF_WITHIN**2


def _counts(noise: Tensor, length: Tensor) -> tuple[FreshNoise, ...]:
    """The units' noise [units], counted by length."""
    edges = noise.new_tensor(EDGES)
    inner = (torch.bucketize(noise, edges) - 1).clamp(0, len(EDGES) - 2)
    bins = len(EDGES) - 1
    flat = torch.bincount(length_bucket(length) * bins + inner, minlength=BUCKETS * bins).reshape(BUCKETS, bins)
    return tuple(
        FreshNoise(bins=tuple((place, float(many)) for place, many in enumerate(row) if many)) for row in flat.tolist()
    )


def _faded(record: FreshNoise, keep: float) -> FreshNoise:
    """`record` with `keep` of every count, less what has faded away."""
    least = 1e-6 * record.count
    return FreshNoise(bins=tuple((place, keep * many) for place, many in record.bins if keep * many > least))


def _begun_noise(begun: tuple[FreshNoise, ...]) -> list[float]:
    """Variance per token of the run's start by bucket, as far as it can be believed; 0 before there is any."""
    return [min(LARGEST_NOISE**2, noise) for noise in _noise_by_bucket(begun) or [0.0] * BUCKETS]


def _noise_by_bucket(records: tuple[FreshNoise, ...]) -> list[float] | None:
    """Variance of the log-weight per token by bucket, that of all buckets where one has few; None without any."""
    known = [(record.count, _centre_and_variance(record)[1]) for record in records if record.count >= 2]
    if not known:
        return None
    pooled = sum(count * variance for count, variance in known) / sum(count for count, _ in known)
    return [_centre_and_variance(record)[1] if record.count >= MIN_FRESH else pooled for record in records]


@lru_cache(maxsize=64)  # the run's start is asked for in every step
def _centre_and_variance(record: FreshNoise) -> tuple[float, float]:
    """Median, and the variance of a normal distribution whose half keeps as near to it as half of the units do.

    Just under half of the units may be anything.
    """
    below = [0.0] * len(EDGES)
    for place, many in record.bins:
        below[place + 1] = many
    below = list(accumulate(below))
    centre = _value_at(0.5 * below[-1], below)
    near, far = 0.0, EDGES[-1] - EDGES[0]
    for _ in range(50):
        middle = (near + far) / 2
        if _below(centre + middle, below) - _below(centre - middle, below) < 0.5 * below[-1]:
            near = middle
        else:
            far = middle
    return centre, (far / HALF_WITHIN) ** 2


def _below(value: float, below: Sequence[float]) -> float:
    """Units below `value`, spread evenly within a bin. below: units below each of EDGES."""
    place = bisect_right(EDGES, value)
    if place == 0:
        return 0.0
    if place == len(EDGES):
        return below[-1]
    share = (value - EDGES[place - 1]) / (EDGES[place] - EDGES[place - 1])
    return below[place - 1] + share * (below[place] - below[place - 1])


def _value_at(units: float, below: Sequence[float]) -> float:
    """The inverse of `_below`."""
    place = min(max(1, bisect_right(below, units)), len(EDGES) - 1)
    inside = below[place] - below[place - 1]
    share = (units - below[place - 1]) / inside if inside else 0.5
    return EDGES[place - 1] + share * (EDGES[place] - EDGES[place - 1])
