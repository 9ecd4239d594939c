"""Effective sample size of the batch, in log space, and the learning-rate factor it gives (VCPO).

rho = ESS / B = (sum w)^2 / (B sum w^2) = exp(2 lse(l) - lse(2 l)) / B, exactly invariant to a common
factor, no clamp. The published code adds 1e-8 to the denominator and lets overflow end as
min(1, nan) = 1, the full learning rate on the worst batch (ALGORITHMS.md 1.2); this does neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log

import torch
from torch import Tensor

from async_rl.objective.advantage import energy
from async_rl.objective.recipe import BiasSettings, EssSettings, Level, Pool
from async_rl.objective.state import FreshMoments, ObjectiveState
from async_rl.objective.tokens import Tokens, behaviour_log_ratio, segment_sum
from async_rl.objective.trust import LENGTH_BUCKETS, length_bucket

MIN_FRESH = 8.0
"""fresh samples in a length bucket before its own variance is believed; below, the pooled one per token"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ess:
    ratio: float
    """rho = ESS / B, in [1/B, 1]; 1/B when any log-weight is not finite; 0 for an empty batch"""
    size: float
    """ESS, trajectories (or turns, tokens)"""
    reference: float
    """rho expected of fresh data of the same lengths"""
    scale: float
    """factor for this step's learning rate, in (0, 1]"""
    nonfinite: int
    """units with a log-weight that is not finite"""


def log_ess(log_weight: Tensor) -> Tensor:
    """log of (sum w)^2 / sum w^2 from log w, [] ; all entries finite, at least one."""
    return 2 * torch.logsumexp(log_weight, 0) - torch.logsumexp(2 * log_weight, 0)


def ess_ratio(log_weight: Tensor) -> float:
    """ESS / B of B log-weights; 1 / B when any is not finite; 0 when there is none."""
    count = len(log_weight)
    if count == 0:
        return 0.0
    ratio = float((log_ess(log_weight) - log(count)).exp())
    return min(1.0, max(ratio, 1 / count)) if isfinite(ratio) else 1 / count


def unit_sums(values: Tensor, tokens: Tokens, level: Level) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and length of every unit with tokens, and the trajectory it belongs to. Three [units]."""
    if level == "token":
        return values, torch.ones_like(values), tokens.trajectory
    if level == "turn":
        return tokens.sum_turn(values), tokens.turn_length, tokens.trajectory_of_turn
    has_tokens = (tokens.length > 0).nonzero().squeeze(-1)
    return tokens.sum_trajectory(values)[has_tokens], tokens.length[has_tokens], has_tokens


def effective_sample_size(tokens: Tokens, settings: EssSettings, state: ObjectiveState) -> tuple[Ess, ObjectiveState]:
    """ESS of the batch, and the state with this batch's fresh tokens in the running reference."""
    total, length, trajectory = unit_sums(behaviour_log_ratio(tokens), tokens, settings.level)
    log_weight = total / length if settings.pool == "mean" else total
    finite = tokens.readable[trajectory]
    ratio = ess_ratio(torch.where(finite, log_weight, torch.nan))
    if settings.reference == "calibrated":
        state = _calibrated(tokens, settings, state)
        reference = _expected_ratio(length[finite], settings.pool, state)
    else:
        reference = float(settings.reference)
    units = len(log_weight)
    if units:
        reference = max(reference, 1 / units)
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[settings.scale]
    scale = min(1.0, ratio / reference) ** power if units else 1.0
    return Ess(ratio=ratio, size=ratio * units, reference=reference, scale=scale,
               nonfinite=int((~finite).sum())), state  # fmt: skip


def _calibrated(tokens: Tokens, settings: EssSettings, state: ObjectiveState) -> ObjectiveState:
    """Add the log-weights of this batch's fresh tokens, unit by unit, to the running moments.

    Fresh: sampled by the version about to be updated, so that the ratio is engine noise alone; taken at
    the proximal policy, so that a batch's later updates do not count as noise. A unit that began under
    older weights contributes its fresh end, at that end's length.
    """
    fresh = (tokens.columns.version == tokens.columns.current_version).to(tokens.log_prob.dtype)
    noise = (tokens.log_proximal - tokens.log_behaviour) * fresh
    total, _, trajectory = unit_sums(noise, tokens, settings.level)
    length = unit_sums(fresh, tokens, settings.level)[0]
    use = (length > 0) & tokens.readable[trajectory]
    total, length = total[use], length[use]
    bucket = length_bucket(length)
    buckets = len(LENGTH_BUCKETS) + 1
    sums = torch.stack(
        [segment_sum(x, bucket, buckets) for x in (torch.ones_like(total), total, total.square(), length)]
    ).T.tolist()
    old = state.fresh or (FreshMoments(),) * buckets
    moments = []
    for before, (count, first, second, tokens_seen) in zip(old, sums, strict=True):
        keep = settings.decay if count > 0 else 1.0
        moments.append(
            FreshMoments(
                count=keep * before.count + count,
                total=keep * before.total + first,
                square=keep * before.square + second,
                length=keep * before.length + tokens_seen,
            )
        )
    return replace(state, fresh=tuple(moments))


def _expected_ratio(length: Tensor, pool: Pool, state: ObjectiveState) -> float:
    """rho of fresh data with these unit lengths: with E[w] = 1 and log-normal w, E[w^2] = exp(var log w)
    in each bucket, so rho = 1 / sum_buckets share exp(var). 1 before any fresh data."""
    buckets = len(LENGTH_BUCKETS) + 1
    index = length_bucket(length)
    counts, lengths = torch.stack(
        [segment_sum(torch.ones_like(length), index, buckets), segment_sum(length, index, buckets)]
    ).tolist()
    per_token = _variance_per_token(state.fresh)
    if per_token is None or sum(counts) == 0:
        return 1.0
    log_terms = []
    for count, tokens_in, moments in zip(counts, lengths, state.fresh, strict=True):
        if count == 0:
            continue
        mean_length = tokens_in / count
        variance = _variance(moments) if moments.count >= MIN_FRESH else per_token * mean_length
        if pool == "mean":
            variance /= mean_length**2
        log_terms.append(log(count / sum(counts)) + variance)
    highest = max(log_terms, default=inf)
    return exp(-(highest + log(sum(exp(term - highest) for term in log_terms))))


def _variance(moments: FreshMoments) -> float:
    """Sample variance of the log-weights of a bucket, nats^2."""
    mean = moments.total / moments.count
    biased = max(0.0, moments.square / moments.count - mean * mean)
    return biased * moments.count / max(moments.count - 1, 1.0)


def _variance_per_token(fresh: tuple[FreshMoments, ...]) -> float | None:
    """Variance of the log-weight per token, pooled over buckets; None without at least two samples."""
    known = [m for m in fresh if m.count >= 2]
    if not known:
        return None
    return sum(_variance(m) * m.count for m in known) / sum(m.length for m in known)


# -------------------- clipping bias
# ST-PPO's clipping-bias correction: kappa, from the size of the gradient that the trust rule cut away.
#
# The exact normaliser of the paper is not confirmed (ALGORITHMS.md 2.4): the modes are readings of
# "normalises gradients by down-weighting unreliable, highly off-policy samples". All but `literal` only
# ever shrink the step; kappa is a factor of the learning rate, because Adam and gradient clipping would
# undo a factor of the gradient.


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasSize:
    """Mean |weight * A| over the batch's kept tokens: cut away, used, and before the rule."""

    cut: Tensor  # []
    used: Tensor  # []
    full: Tensor  # []


def scalar_size(tokens: Tokens, keep: Tensor, full: Tensor, used: Tensor, advantage: Tensor) -> BiasSize:
    """The free estimate (ALGORITHMS.md 2.4 B). `keep` [trajectories] bool, the rest [tokens]."""
    ok = keep[tokens.trajectory].to(full.dtype)
    count = ok.sum().clamp(min=1.0)
    return BiasSize(
        cut=(((full - used) * advantage).abs() * ok).sum() / count,
        used=((used * advantage).abs() * ok).sum() / count,
        full=((full * advantage).abs() * ok).sum() / count,
    )


def logit_size(tokens: Tokens, column: Tensor) -> Tensor:
    """sqrt(sum_t column_t^2 energy_t): the norm at the logits of sum_t column_t grad log pi_t. []"""
    return (column.square() * energy(tokens, "logit")).sum().sqrt()


def kappa_of(cut: float, used: float, settings: BiasSettings, state: ObjectiveState) -> tuple[float, ObjectiveState]:
    """Learning-rate factor from the sizes of the cut and the used gradient, and the new running size.

    1 when nothing was cut; 0 when a size is not finite, so that a broken batch never speeds learning up.
    """
    if settings.kappa in ("none", "per_trajectory"):
        return 1.0, state
    if not (isfinite(cut) and isfinite(used)):
        return 0.0, state
    if cut == 0.0:
        return 1.0, state
    if settings.kappa == "relative":
        return used / (used + settings.strength * cut), state
    if settings.kappa == "literal":
        return 1 / (cut + settings.floor), state
    size = cut if state.bias_size is None else state.bias_size
    kappa = min(1.0, size / max(cut, settings.floor))
    running = settings.decay * size + (1 - settings.decay) * cut
    return kappa, replace(state, bias_size=running)


def kappa_per_trajectory(
    tokens: Tokens, full: Tensor, used: Tensor, advantage: Tensor, settings: BiasSettings
) -> Tensor:
    """used / (used + strength * cut) of each trajectory, 1 where nothing is cut. [trajectories]"""
    weight = torch.ones_like(full)
    if settings.estimator == "logit":
        weight = energy(tokens, "logit").sqrt()
    cut = tokens.sum_trajectory(((full - used) * advantage).abs() * weight)
    kept = tokens.sum_trajectory((used * advantage).abs() * weight)
    return torch.where(cut > 0, kept / (kept + settings.strength * cut), torch.ones_like(cut))
