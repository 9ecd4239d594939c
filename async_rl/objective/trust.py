"""Trust rules: what becomes of a token's importance weight when its ratio is far from 1; and which data are left out.

Formulas, one section a rule: docs/algorithms.md#trust (#ppo-clip, #dual-clip, #truncate, #interval, #cispo, #dispo,
#topr, #damp, #divergence-mask, #m2po, #gmpo, #covariance; those of gates.py and groupwise.py), #correction and
#selection. Shapes: T policy tokens, I trajectories.

A rule turns (ratio, advantage) into the weight kappa; the coefficient is share * kappa * advantage, pulled back through
the ratio where the published surrogate differentiates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from async_rl.objective.advantage import greedy_reward
from async_rl.objective.axes import TrustSettings
from async_rl.objective.gates import (
    MOVING_BOUNDS,
    inverted,
    moving_bounds,
    sequence_gamma,
    soft_gate,
    towards_target,
)
from async_rl.objective.group_filter import deviating
from async_rl.objective.groupwise import classified, discriminated, regressed
from async_rl.objective.recipe import Recipe
from async_rl.objective.tokens import (
    LARGEST_LOG_RATIO,
    Ratio,
    Tokens,
    log_denominator,
    pooled,
    segment_max,
    segment_min,
    weight_of,
)
from async_rl.trajectory.types import LENGTH_BUCKETS, bucket_names

__all__ = ["LENGTH_BUCKETS", "Selection", "bucket_names", "length_bucket", "select"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a rule made of a batch."""

    weight: Tensor  # [T], kappa
    full: Tensor  # [T], the weight without the rule; full - weight was cut away
    clipped: Tensor  # [T] bool
    dual: Tensor  # [T] bool: clipped by the dual clip
    advantage: Tensor  # [T], as given, or what the rule replaces it with
    through: bool
    """the gradient goes through the (pooled) ratio, else to each token's own log-prob"""
    extra: Tensor | None = None  # [T]
    """added to kappa * advantage, on the token's own log-prob (kl_cov's penalty)"""


def trust(tokens: Tokens, ratio: Ratio, advantage: Tensor, recipe: Recipe) -> Trust:
    """Apply the recipe's rule. advantage [T]. Every weight is finite."""
    match recipe.trust.rule:
        case "ppo" | "clip_cov" | "kl_cov" | "sat" | "bapo" | "aspo" | "cpgd" | "mix_ppo" | "dcpo":
            return _surrogate(tokens, ratio, advantage, recipe)
        case "sapo" | "gbpo" | "bpo":
            return _gated(tokens, ratio, advantage, recipe)
        case "vespo":
            log_ratio = tokens.log_prob - log_denominator(tokens, recipe.ratio)
            return _detached(sequence_gamma(tokens, log_ratio, advantage, recipe.trust), advantage)
        case "regress":
            return _detached(torch.ones_like(advantage), regressed(tokens, ratio, advantage, recipe.trust))
        case "disco":
            return _detached(ratio.value * ratio.inside, discriminated(tokens, ratio, recipe.trust))
        case "real":
            return _detached(torch.ones_like(advantage), classified(tokens, ratio, recipe.trust))
        case "none":
            return _plain(ratio, advantage, recipe)
        case "gmpo":
            return _gmpo(tokens, ratio, advantage, recipe)
        case _:
            weight, clipped = _detached_weight(tokens, ratio, advantage, recipe)
            full = ratio.value
            if recipe.trust.rule == "damp":  # damps plain REINFORCE
                full = torch.ones_like(full)
            elif recipe.trust.rule == "topr":  # positives are not weighted at all
                full = torch.where(advantage < 0, full, 1.0)
            elif recipe.trust.rule in ("dppo", "m2po", "m2po_all"):  # differentiate the ratio
                full = full * ratio.inside
            return Trust(weight=weight, full=full, clipped=clipped, dual=torch.zeros_like(clipped),
                         advantage=advantage, through=False)  # fmt: skip


def _detached(weight: Tensor, advantage: Tensor) -> Trust:
    """A weight that cuts nothing away. weight, advantage [T]."""
    none = torch.zeros_like(weight, dtype=torch.bool)
    return Trust(weight=weight, full=weight, clipped=none, dual=none, advantage=advantage, through=False)


def _gated(tokens: Tokens, ratio: Ratio, advantage: Tensor, recipe: Recipe) -> Trust:
    """SAPO, GBPO, BPO: a weight for every ratio; what it leaves of the ratio is cut away. advantage [T]."""
    settings = recipe.trust
    if settings.rule == "sapo":
        weight = soft_gate(ratio, advantage, settings)
    else:
        weight = towards_target(tokens, ratio, advantage, settings)
    full = ratio.value * ratio.inside
    outside = (ratio.value < 1 - settings.clip_low) | (ratio.value > 1 + settings.clip_high)
    clipped = torch.zeros_like(outside) if settings.rule == "sapo" else outside
    through = settings.gradient == "unit"
    return Trust(weight=weight, full=full, clipped=clipped, dual=torch.zeros_like(clipped), advantage=advantage,
                 through=through)  # fmt: skip


def _plain(ratio: Ratio, advantage: Tensor, recipe: Recipe) -> Trust:
    """Rule none: importance sampling without a bound; REINFORCE at ratio level none. advantage [T]."""
    through = recipe.ratio.level != "none" and recipe.trust.gradient == "unit"
    weight = ratio.value * ratio.inside if through else ratio.value
    clipped = torch.zeros_like(ratio.inside)
    return Trust(weight=weight, full=weight, clipped=clipped, dual=clipped, advantage=advantage, through=through)


def _surrogate(tokens: Tokens, ratio: Ratio, advantage: Tensor, recipe: Recipe) -> Trust:
    """min(rA, clip(r)A), with dual clip max(., cA) for A < 0; the two covariance methods on top. CPGD has log pi in the
    place of r, ASPO 1 / r where A > 0. advantage [T]."""
    settings = recipe.trust
    value, up, down = ratio.value, advantage > 0, advantage < 0
    none = torch.zeros_like(up)
    extra = None
    low: Tensor | float = 1 - settings.clip_low
    high: Tensor | float = 1 + settings.clip_high
    if settings.rule == "kl_cov":  # unclipped surrogate plus a penalty on few tokens
        clipped = dual = none
        chosen = covariance_top(tokens, advantage, settings.covariance_fraction)
        extra = -settings.covariance_penalty * torch.where(chosen, ratio.log.sign(), 0.0)
    else:
        if settings.rule in MOVING_BOUNDS or settings.uncertain_share > 0:
            low, high = moving_bounds(tokens, ratio, advantage, settings)
        clipped = (up & (value > high)) | (down & (value < low))
        dual = (down & (value > settings.dual_clip)) if settings.dual_clip > 0 else none
        clipped = clipped | dual
        if settings.rule == "clip_cov":
            clipped = clipped | covariance_choice(tokens, advantage, ~clipped, settings)
    through = settings.gradient == "unit" and settings.rule not in ("aspo", "cpgd")
    full = value * ratio.inside if through else value
    if settings.rule == "cpgd":
        full = torch.ones_like(value)
    elif settings.rule == "aspo":
        full = inverted(ratio, advantage, settings)
    weight = torch.where(clipped, 0.0, full)
    if settings.beyond_low > 0:
        weight = torch.where(down & (value < low), settings.beyond_low * low, weight)
    if settings.beyond_high > 0:
        weight = torch.where(up & (value > high), settings.beyond_high * high, weight)
    return Trust(weight=weight, full=full, clipped=clipped, dual=dual, advantage=advantage,
                 through=through, extra=extra)  # fmt: skip


def _detached_weight(tokens: Tokens, ratio: Ratio, advantage: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Rules of the form sg(weight) * A * log pi: the weight [T], and where the rule changed it [T] bool."""
    settings, value = recipe.trust, ratio.value
    match settings.rule:
        case "truncate":
            weight = value.clamp(max=settings.cap)
        case "interval":
            weight = torch.where((value >= settings.low) & (value <= settings.high), value, 0.0)
        case "cispo":
            weight = value.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        case "dispo":
            positive = value.clamp(1 - settings.positive_low, 1 + settings.positive_high)
            negative = value.clamp(1 - settings.negative_low, 1 + settings.negative_high)
            weight = torch.where(advantage > 0, positive, negative)
        case "topr":
            clipped = (advantage < 0) & (value > settings.cap)
            return torch.where(advantage < 0, value.clamp(max=settings.cap), 1.0), clipped
        case "damp":
            return (1 / value).clamp(max=1.0), value > 1
        case "dppo":
            return _divergence_mask(tokens, ratio, advantage, recipe)
        case _:
            assert settings.rule in ("m2po", "m2po_all")
            kept = _second_moment_mask(tokens, ratio, advantage, settings)
            return torch.where(kept, value * ratio.inside, 0.0), ~kept
    return weight, weight != value


def _divergence_mask(tokens: Tokens, ratio: Ratio, advantage: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """DPPO: weight [T] and which tokens are dropped [T] bool, because their probability moved far in the direction of
    the advantage [T] already."""
    settings = recipe.trust
    log_old = log_denominator(tokens, recipe.ratio)
    new, old = tokens.log_prob.exp(), log_old.exp()
    if settings.divergence == "probability":
        distance = (new - old).abs()
    else:
        distance = bernoulli_kl(log_old, tokens.log_prob)
    rose = new > old
    drop = ((advantage > 0) & rose & (distance > settings.mask_high)) | (
        (advantage <= 0) & ~rose & (distance > settings.mask_low)
    )
    return torch.where(drop, 0.0, ratio.value * ratio.inside), drop


def bernoulli_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(Bernoulli(p) || Bernoulli(q)) of log-probs, [T] each, >= 0; infinite where q is 1 and p is not."""
    log_p, log_q = log_p.clamp(max=0.0), log_q.clamp(max=0.0)
    rest_p, rest_q = -torch.expm1(log_p), -torch.expm1(log_q)
    return log_p.exp() * (log_p - log_q) + torch.xlogy(rest_p, rest_p) - torch.xlogy(rest_p, rest_q)


def _second_moment_mask(tokens: Tokens, ratio: Ratio, advantage: Tensor, settings: TrustSettings) -> Tensor:
    """M2PO, Algorithm 1: the tokens that stay, [T] bool. advantage [T].

    Trust-region tokens are those whose update moves the ratio further from 1: A > 0 and ratio > 1, or A < 0 and
    ratio < 1. Of these the largest squared log-ratios go until the mean of the rest is at most `second_moment`; the
    others stay. m2po_all treats every token so, and keeps one at least. The mean is over the whole batch, so it does
    not depend on how the batch is cut.
    """
    every = settings.rule == "m2po_all"
    region = tokens.finite[tokens.trajectory] if every else advantage * ratio.log.sign() > 0
    chosen = region.nonzero().squeeze(-1)
    square, order = ratio.log[chosen].square().sort(stable=True)
    mean = square.cumsum(0) / torch.arange(1, len(square) + 1, device=square.device, dtype=square.dtype)
    within = mean < settings.second_moment if every else mean <= settings.second_moment
    gone = order[max(int(within.sum()), int(every)) :]
    stays = ~region if not every else torch.zeros_like(region)
    stays[chosen] = True
    stays[chosen[gone]] = False
    return stays


def _gmpo(tokens: Tokens, ratio: Ratio, advantage: Tensor, recipe: Recipe) -> Trust:
    """GMPO: geometric mean of token ratios clipped in log space; A is the trajectory's mean. advantage [T].

    y_t = s min(s x_t, s clip(x_t, -low, high)), ratio = exp(mean y), loss = -A ratio
    (verl `geo_mean`). The clip is the numerical clamp: no other is applied to tokens.
    """
    settings = recipe.trust
    x = tokens.log_prob - log_denominator(tokens, recipe.ratio)
    sign = advantage.sign()
    bounded = torch.minimum(sign * x, sign * x.clamp(-settings.clip_low, settings.clip_high)) * sign
    bounded = torch.where(sign == 0, 0.0, bounded)
    clipped = ((sign > 0) & (x > settings.clip_high)) | ((sign < 0) & (x < -settings.clip_low))
    log_unit = pooled(bounded, tokens, "sequence", "mean")
    inside = log_unit.abs() <= LARGEST_LOG_RATIO
    full = weight_of(log_unit) * inside
    mean_advantage = tokens.mean_trajectory(advantage)[tokens.trajectory]
    return Trust(weight=torch.where(clipped, 0.0, full), full=full, clipped=clipped,
                 dual=torch.zeros_like(clipped), advantage=mean_advantage, through=False)  # fmt: skip


def correction_weight(tokens: Tokens, recipe: Recipe) -> Tensor:
    """Detached weight of the proximal over the behaviour policy, [T]; 1 when the recipe has none."""
    settings = recipe.correction
    if settings.rule == "none":
        return torch.ones_like(tokens.log_prob)
    proximal = log_denominator(tokens, recipe.ratio)
    log_weight = pooled(proximal - tokens.log_behaviour, tokens, settings.level, settings.pool)
    weight = weight_of(log_weight)
    if settings.rule == "truncate":
        weight = weight.clamp(max=settings.high)
    else:
        weight = torch.where((weight >= settings.low) & (weight <= settings.high), weight, 0.0)
    if settings.normalise and len(weight):
        ok = tokens.finite[tokens.trajectory]
        mean = (weight * ok).sum() / ok.sum().clamp(min=1)
        weight = torch.where(mean > 0, weight / mean.clamp(min=torch.finfo(weight.dtype).tiny), weight)
    return weight


# Clip-Cov and KL-Cov: the few tokens whose log-prob and advantage move together most (docs/algorithms.md#covariance).


def covariance(tokens: Tokens, advantage: Tensor) -> Tensor:
    """(A - mean A)(log pi - mean log pi), means over the batch's tokens. advantage [T] -> [T]."""
    ok = tokens.finite[tokens.trajectory]
    count = ok.sum().clamp(min=1)
    centred = advantage - (advantage * ok).sum() / count
    return centred * (tokens.log_prob - (tokens.log_prob * ok).sum() / count)


def covariance_choice(tokens: Tokens, advantage: Tensor, candidate: Tensor, settings: TrustSettings) -> Tensor:
    """Clip-Cov: a random covariance_fraction of all tokens, among candidates within the bounds. [T] bool.

    Random numbers come from a generator seeded with the seed and the version: same batch, same choice.
    """
    cov = covariance(tokens, advantage)
    candidate = candidate & (cov > settings.covariance_low) & (cov < settings.covariance_high)
    candidate = candidate & tokens.finite[tokens.trajectory]
    among = tokens.finite
    if settings.covariance_of == "replayed":
        reused = tokens.columns.reused
        among = among & (torch.zeros_like(among) if reused is None else reused.replayed)
        candidate = candidate & among[tokens.trajectory]
    indices = candidate.nonzero().squeeze(-1)
    generator = torch.Generator().manual_seed((settings.seed << 32) ^ tokens.columns.current_version)
    order = torch.randperm(len(indices), generator=generator).to(indices.device)
    chosen = torch.zeros_like(candidate)
    chosen[indices[order[: _count(tokens, settings.covariance_fraction, among)]]] = True
    return chosen


def covariance_top(tokens: Tokens, advantage: Tensor, fraction: float) -> Tensor:
    """KL-Cov: the covariance_fraction of all tokens with the largest covariance. [T] bool."""
    cov = torch.where(tokens.finite[tokens.trajectory], covariance(tokens, advantage), -torch.inf)
    chosen = torch.zeros_like(cov, dtype=torch.bool)
    number = min(_count(tokens, fraction, tokens.finite), len(cov))
    if number:
        chosen[cov.topk(number).indices] = True
    return chosen


def _count(tokens: Tokens, fraction: float, among: Tensor) -> int:
    """How many of the tokens of these trajectories `fraction` is, at least 1. among [I] bool."""
    return max(1, int(fraction * float(tokens.length[among].sum())))


# Selection: which trajectories are left out, and why. Every rejection is counted by reason and length.


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which trajectories a step trains on."""

    keep: Tensor  # [I] bool
    rejected: Mapping[str, Tensor]
    """reason -> [I] bool; a trajectory may have several"""

    def without(self, why: str, left_out: Tensor) -> Selection:
        """With these left out as well, [I] bool."""
        return Selection(keep=self.keep & ~left_out, rejected={**self.rejected, why: left_out})


def length_bucket(length: Tensor) -> Tensor:
    """Bucket index of each length, [n] -> [n] int64; the buckets are those of `bucket_names`."""
    ends = torch.tensor(LENGTH_BUCKETS, dtype=length.dtype, device=length.device)
    return torch.bucketize(length, ends, right=True)


def select(tokens: Tokens, recipe: Recipe, advantage: Tensor, zero_signal: Tensor) -> Selection:
    """Apply the recipe's selection. advantage [T], zero_signal [I] bool."""
    settings = recipe.select
    if recipe.ratio.denominator in ("proximal", "proximal_loglinear"):
        log_ratio = log_denominator(tokens, recipe.ratio) - tokens.log_behaviour
    else:
        log_ratio = tokens.log_prob - tokens.log_behaviour
    total = tokens.sum_trajectory(log_ratio)
    mean = tokens.mean_trajectory(log_ratio)
    rejected = {"nonfinite": ~tokens.finite}
    if settings.sequence_low > 0 or settings.sequence_high > 0:
        rejected["sequence_ratio"] = _outside(total, settings.sequence_low, settings.sequence_high)
    if settings.geometric_low > 0 or settings.geometric_high > 0:
        rejected["geometric_ratio"] = _outside(mean, settings.geometric_low, settings.geometric_high)
    if settings.veto > 0:
        smallest = segment_min(log_ratio, tokens.trajectory, tokens.num_trajectories, empty=0.0)
        rejected["veto"] = smallest < log(settings.veto)
    if settings.opsm > 0:
        moved = tokens.mean_trajectory(log_denominator(tokens, recipe.ratio) - tokens.log_prob)
        rejected["opsm"] = (tokens.mean_trajectory(advantage) < 0) & (moved > settings.opsm)
    if settings.drop_truncated:
        rejected["truncated"] = tokens.columns.truncated
    rejected.update(_by_task(tokens, recipe))
    if recipe.advantage.baseline == "greedy":
        columns, group = tokens.columns, tokens.group_of_trajectory
        rejected["greedy"] = torch.zeros_like(tokens.finite) if columns.greedy is None else columns.greedy
        rejected["no_greedy"] = greedy_reward(tokens, tokens.reward).isnan()[group]
    if recipe.teaching.alone and recipe.teaching.coefficient > 0 and tokens.columns.log_teacher is not None:
        missing = (~torch.isfinite(tokens.columns.log_teacher)).double()
        rejected["no_teacher"] = tokens.sum_trajectory(missing) > 0
    if settings.largest_share < 1:
        rejected["small_advantage"] = ~_largest(tokens.mean_trajectory(advantage.abs()), settings.largest_share)
    if settings.drop_zero_signal:
        largest = segment_max(advantage.abs(), tokens.trajectory, tokens.num_trajectories, empty=0.0)
        baselined = recipe.advantage.baseline == "opob" or recipe.advantage.whiten_trajectories
        rejected["zero_signal"] = zero_signal if baselined else largest == 0
    keep = torch.ones_like(tokens.finite)
    for mask in rejected.values():
        keep = keep & ~mask
    return Selection(keep=keep, rejected=rejected)


def _by_task(tokens: Tokens, recipe: Recipe) -> dict[str, Tensor]:
    """What is rejected for what the task noted, and for its rewards as they came: reason -> [I] bool."""
    settings, group = recipe.select, tokens.group_of_trajectory
    rejected: dict[str, Tensor] = {}
    if settings.drop_flag:
        rejected["flag"] = flagged(tokens, settings.drop_flag)
    if recipe.advantage.note:
        noted = tokens.columns.noted.trajectory.get(recipe.advantage.note)
        rejected["not_noted"] = torch.ones_like(tokens.finite) if noted is None else noted.isnan()
    if settings.drop_equal_rewards:
        counted, reward = tokens.compared, tokens.reward
        top = segment_max(torch.where(counted, reward, -torch.inf), group, tokens.num_groups, empty=-torch.inf)
        bottom = segment_min(torch.where(counted, reward, torch.inf), group, tokens.num_groups, empty=torch.inf)
        rejected["equal_rewards"] = ~(top > bottom)[group]
    if settings.deviating_share < 1:
        rejected["small_deviation"] = ~deviating(tokens, tokens.reward, settings.deviating_share)
    if settings.group_low > 0 or settings.group_high > 0:
        counted = tokens.compared.double()
        mean = (tokens.sum_group(tokens.reward * counted) / tokens.sum_group(counted).clamp(min=1.0))[group]
        above = (mean > settings.group_high) if settings.group_high > 0 else torch.zeros_like(tokens.finite)
        rejected["group_reward"] = (mean < settings.group_low) | above
    return rejected


def flagged(tokens: Tokens, name: str) -> Tensor:
    """Trajectories that the task noted `name` of other than 0: of the episode, a turn or a token. [I] bool"""
    noted, columns = tokens.columns.noted, tokens.columns
    found = torch.zeros_like(tokens.finite)
    if (own := noted.trajectory.get(name)) is not None:
        found = found | _is_set(own)
    if (turns := noted.turn.get(name)) is not None:
        found = found.index_put((columns.trajectory_of_turn[_is_set(turns)],), found.new_ones(()))
    if (each := noted.token.get(name)) is not None:
        found = found.index_put((tokens.trajectory[_is_set(each)],), found.new_ones(()))
    return found


def _is_set(values: Tensor) -> Tensor:
    """[n] -> [n] bool: there, and not 0."""
    return ~values.isnan() & (values != 0)


def _largest(values: Tensor, share: float) -> Tensor:
    """The `share` of the values, rounded up, that are the largest, and what equals the smallest of them. [n] bool"""
    number = -int(-(share * len(values) - 1e-9) // 1)
    return values >= values.topk(min(max(number, 1), len(values))).values[-1] if len(values) else values.bool()


def _outside(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """Whether exp(log_ratio) [I] is below `low` or above `high`, [I] bool; a bound of 0 is off."""
    outside = torch.zeros_like(log_ratio, dtype=torch.bool)
    if low > 0:
        outside |= log_ratio < log(low)
    if high > 0:
        outside |= log_ratio > log(high)
    return outside
