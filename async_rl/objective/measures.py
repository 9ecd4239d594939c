"""What a batch says about itself: how far off policy it is, and the learning-rate factors that follow from that.

In the order of the file: the effective sample size (VCPO), the size of what the trust rule cut away (ST-PPO), and the
other metrics. Keys and formulas of metrics: docs/metrics.md; they are gathered as tensors and read with one transfer.
Shapes: T policy tokens, U turns, I trajectories, all float64.

ESS (docs/algorithms.md#ess): rho = ESS / B = (sum w)^2 / (B sum w^2) = exp(2 lse(l) - lse(2 l)) / B, exactly invariant
to a common factor, without a clamp. The published code adds 1e-8 to the denominator and lets overflow end as
min(1, nan) = 1, the full learning rate on the worst batch; this does neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite, log

import torch
from torch import Tensor

from async_rl.objective.advantage import energy
from async_rl.objective.axes import BiasSettings, EssSettings, Level
from async_rl.objective.reference import begun_ratio, fresh_ratio, learn
from async_rl.objective.state import ObjectiveState
from async_rl.objective.tokens import Tokens, behaviour_log_ratio, segment_max, segment_min
from async_rl.objective.trust import Selection, Trust, bucket_names, length_bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class Ess:
    """The effective sample size of a batch, and what it says."""

    ratio: float
    """rho = ESS / B, in [1/B, 1]; 1/B when any log-weight is not finite; 0 for an empty batch"""
    size: float
    """ESS, trajectories (or turns, tokens)"""
    reference: float
    """rho that counts as on policy at these lengths"""
    fresh: float
    """rho of fresh data of these lengths, as the newest ones are; the reference, where nothing holds that up"""
    noise: float | None
    """variance of this batch's fresh log-weights, as a share of what the run's start allows; None without any"""
    scale: float
    """factor for this step's learning rate, in (0, 1]"""
    nonfinite: int
    """units with a log-weight that is not finite"""


def log_ess(log_weight: Tensor) -> Tensor:
    """log of (sum w)^2 / sum w^2 [] from log w [n]; all entries finite, at least one."""
    return 2 * torch.logsumexp(log_weight, 0) - torch.logsumexp(2 * log_weight, 0)


def ess_ratio(log_weight: Tensor) -> float:
    """ESS / B of B log-weights [B]; 1 / B when any is not finite; 0 when there is none."""
    count = len(log_weight)
    if count == 0:
        return 0.0
    ratio = float((log_ess(log_weight) - log(count)).exp())
    return min(1.0, max(ratio, 1 / count)) if isfinite(ratio) else 1 / count


def unit_sums(values: Tensor, tokens: Tokens, level: Level) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of `values` [T] over every unit with tokens, its length, and its trajectory (int64): three [units]."""
    if level == "token":
        return values, torch.ones_like(values), tokens.trajectory
    if level == "turn":
        return tokens.sum_turn(values), tokens.turn_length, tokens.trajectory_of_turn
    has_tokens = (tokens.length > 0).nonzero().squeeze(-1)
    return tokens.sum_trajectory(values)[has_tokens], tokens.length[has_tokens], has_tokens


def effective_sample_size(tokens: Tokens, settings: EssSettings, state: ObjectiveState) -> tuple[Ess, ObjectiveState]:
    """ESS of the batch, and the state with this batch's fresh tokens in the running reference."""
    total, length, trajectory = unit_sums(behaviour_log_ratio(tokens), tokens, settings.level)
    if tokens.weighted is not None:
        there = tokens.weighted[trajectory]
        total, length, trajectory = total[there], length[there], trajectory[there]
    log_weight = total / length if settings.pool == "mean" else total
    finite = tokens.readable[trajectory]
    ratio = ess_ratio(torch.where(finite, log_weight, torch.nan))
    noise: float | None = None
    fresh = 1.0
    if settings.reference == "calibrated":
        noise, state = _learnt(tokens, settings, state)
        fresh = fresh_ratio(length[finite], settings.pool, state)
        reference = max(fresh, settings.floor * begun_ratio(length[finite], settings.pool, state))
    else:
        reference = float(settings.reference)
    units = len(log_weight)
    if units:
        reference = max(reference, 1 / units)
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[settings.scale]
    scale = min(1.0, ratio / reference) ** power if units else 1.0
    return Ess(ratio=ratio, size=ratio * units, reference=reference, fresh=fresh, noise=noise, scale=scale,
               nonfinite=int((~finite).sum())), state  # fmt: skip


def measure_ess(meter: Meter, ess: Ess) -> None:
    """ess/*, but for that of tokens."""
    meter.put("ess/ratio", ess.ratio)
    meter.put("ess/size", ess.size)
    meter.put("ess/reference", ess.reference)
    meter.put("ess/fresh", ess.fresh)
    if ess.noise is not None:
        meter.put("ess/noise", ess.noise)
    meter.put("ess/nonfinite", ess.nonfinite)


def _learnt(tokens: Tokens, settings: EssSettings, state: ObjectiveState) -> tuple[float | None, ObjectiveState]:
    """Noise of this batch's fresh tokens (None without any), and the state that has learnt them unit by unit.

    Fresh: sampled by the version about to be updated, so that the ratio is engine noise alone; taken at the proximal
    policy, so that a batch's later updates do not count as noise. A unit that began under older weights contributes its
    fresh end, at that end's length.
    """
    fresh = (tokens.columns.version == tokens.columns.current_version).to(tokens.log_prob.dtype)
    noise = (tokens.log_proximal - tokens.log_behaviour) * fresh
    total, _, trajectory = unit_sums(noise, tokens, settings.level)
    length = unit_sums(fresh, tokens, settings.level)[0]
    use = (length > 0) & tokens.readable[trajectory]
    if tokens.weighted is not None:
        use = use & tokens.weighted[trajectory]
    if not bool(use.any()):
        return None, state
    return learn(total[use], length[use], settings, state)


# Clipping bias: the size of the gradient that the trust rule cut away, and kappa from it.
#
# The exact normaliser of ST-PPO's paper is not confirmed (docs/algorithms.md#clipping-bias): the modes are readings of
# "normalises gradients by down-weighting unreliable, highly off-policy samples". All but `literal` only ever shrink the
# step. Kappa is a factor of the learning rate, because Adam and gradient clipping would undo a factor of the gradient.


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasSize:
    """Mean |weight * A| over the batch's kept tokens: cut away, used, and before the rule."""

    cut: Tensor  # []
    used: Tensor  # []
    full: Tensor  # []


def scalar_size(tokens: Tokens, keep: Tensor, full: Tensor, used: Tensor, advantage: Tensor) -> BiasSize:
    """The free estimate (docs/algorithms.md#clipping-bias). keep [I] bool, the rest [T]."""
    ok = keep[tokens.trajectory].to(full.dtype)
    count = ok.sum().clamp(min=1.0)
    return BiasSize(
        cut=(((full - used) * advantage).abs() * ok).sum() / count,
        used=((used * advantage).abs() * ok).sum() / count,
        full=((full * advantage).abs() * ok).sum() / count,
    )


def logit_size(tokens: Tokens, column: Tensor) -> Tensor:
    """sqrt(sum_t column_t^2 energy_t) [], column [T]: the norm at the logits of sum_t column_t grad log pi_t."""
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
    """used / (used + strength * cut) of each trajectory, [I], 1 where nothing is cut; full, used, advantage [T]."""
    weight = torch.ones_like(full)
    if settings.estimator == "logit":
        weight = energy(tokens, "logit").sqrt()
    cut = tokens.sum_trajectory(((full - used) * advantage).abs() * weight)
    kept = tokens.sum_trajectory((used * advantage).abs() * weight)
    return torch.where(cut > 0, kept / (kept + settings.strength * cut), torch.ones_like(cut))


# Metrics.


class Meter:
    """Named scalars, on the device until `read`."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor | float] = {}

    def put(self, name: str, value: Tensor | float) -> None:
        self._values[name] = value

    def read(self) -> dict[str, float]:
        tensors = {name: v for name, v in self._values.items() if isinstance(v, Tensor)}
        if tensors:
            numbers = torch.stack([v.double().reshape(()) for v in tensors.values()]).tolist()
        else:
            numbers = []
        read = dict(zip(tensors, numbers, strict=True))
        return {name: read[name] if name in read else float(v) for name, v in self._values.items()}


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """Mean [] of `values` [n] over `mask` [n] bool, 0 where it is empty."""
    chosen = mask.to(values.dtype)
    return torch.where(mask, values, 0.0).sum() / chosen.sum().clamp(min=1.0)


def quantile(values: Tensor, share: float) -> Tensor:
    """The smallest of `values` [n] that at least `share` of them do not exceed, []; 0 when there is none."""
    if len(values) == 0:
        return values.new_zeros(())
    return values.kthvalue(max(1, -int(-share * len(values) // 1)))[0]


def measure_ratios(meter: Meter, tokens: Tokens, log_weight_cap: float | None) -> None:
    """is/*, kl/behaviour*, kl/mismatch and ess/ratio_clipped, over tokens of finite trajectories."""
    ok = tokens.of_fresh(tokens.finite)[tokens.trajectory]
    log_ratio = tokens.log_prob - tokens.log_behaviour
    bounded = log_ratio.clamp(-20.0, 20.0)
    ratio = bounded.exp()
    k3 = ratio - 1 - bounded
    meter.put("kl/behaviour", mean_of(k3, ok))
    meter.put("kl/behaviour_k1", mean_of(-log_ratio, ok))
    fresh = ok & (tokens.columns.version == tokens.columns.current_version)
    if bool(fresh.any()):
        engine = (tokens.log_proximal - tokens.log_behaviour).clamp(-20.0, 20.0)
        meter.put("kl/mismatch", mean_of(engine.exp() - 1 - engine, fresh))
    meter.put("is/ratio_mean", mean_of(ratio, ok))
    meter.put("is/chi2_token", mean_of(ratio.square(), ok) - 1)
    if len(ratio):
        chosen = ratio[ok]
        meter.put("is/ratio_p99", quantile(chosen, 0.99))
        if len(chosen):
            meter.put("is/ratio_max", chosen.max())
            meter.put("is/ratio_min", chosen.min())
    total = tokens.sum_trajectory(log_ratio)[tokens.of_fresh(tokens.finite & (tokens.length > 0))]
    if len(total):
        meter.put("is/log_weight_mean", total.mean())
        meter.put("is/log_weight_std", total.std(correction=0))
        meter.put("is/log_weight_min", total.min())
        meter.put("is/log_weight_max", total.max())
    if len(total) and log_weight_cap is not None:
        cut = total.clamp(max=log_weight_cap)
        log_ess = 2 * torch.logsumexp(cut, 0) - torch.logsumexp(2 * cut, 0)
        meter.put("ess/ratio_clipped", log_ess.exp() / len(total))


def measure_lag(meter: Meter, tokens: Tokens) -> None:
    """lag/*: steps between the weights that sampled a token and those about to be updated."""
    if tokens.num_tokens == 0:
        return
    lag = (tokens.columns.current_version - tokens.columns.version).double()
    if tokens.fresh is not None:  # the pool's rows have a bound of their own
        chosen = tokens.fresh[tokens.trajectory]
        lag = torch.where(chosen, lag, 0.0)
        if not bool(chosen.any()):
            return
        meter.put("lag/mean", mean_of(lag, chosen))
    else:
        meter.put("lag/mean", lag.mean())
    meter.put("lag/max", lag.max())
    meter.put("lag/p95", quantile(lag if tokens.fresh is None else lag[chosen], 0.95))
    highest = segment_max(lag, tokens.trajectory, tokens.num_trajectories, empty=0.0)
    lowest = segment_min(lag, tokens.trajectory, tokens.num_trajectories, empty=0.0)
    meter.put("lag/span", mean_of(highest - lowest, tokens.of_fresh(tokens.length > 0)))


def measure_trust(meter: Meter, tokens: Tokens, trust: Trust, keep: Tensor, advantage: Tensor) -> None:
    """clip/*: shares of kept tokens whose weight the trust rule changed. keep [I] bool, advantage [T]."""
    ok = keep[tokens.trajectory]
    clipped = trust.clipped.double()
    meter.put("clip/frac", mean_of(clipped, ok))
    meter.put("clip/frac_pos", mean_of(clipped * (advantage > 0), ok))
    meter.put("clip/frac_neg", mean_of(clipped * (advantage < 0), ok))
    meter.put("clip/dual", mean_of(trust.dual.double(), ok))


def measure_selection(meter: Meter, tokens: Tokens, selection: Selection) -> None:
    """reject/*: tokens and trajectories left out, by reason, and tokens by length bucket."""
    rejected = ~selection.keep
    total = tokens.length.sum().clamp(min=1.0)
    trajectories = max(tokens.num_trajectories, 1)
    meter.put("reject/tokens", (tokens.length * rejected).sum() / total)
    meter.put("reject/trajectories", rejected.double().sum() / trajectories)
    bucket = length_bucket(tokens.length)
    for reason, mask in selection.rejected.items():
        meter.put(f"reject/{reason}/tokens", (tokens.length * mask).sum())
        meter.put(f"reject/{reason}/trajectories", mask.double().sum())
        by_length = torch.zeros(len(bucket_names()), dtype=torch.float64, device=mask.device)
        by_length.index_add_(0, bucket, mask.double())
        for name, count in zip(bucket_names(), by_length, strict=True):
            meter.put(f"reject/{reason}/{name}", count)
    meter.put("len/kept", mean_of(tokens.length, selection.keep & (tokens.length > 0)))
    meter.put("len/rejected", mean_of(tokens.length, rejected & (tokens.length > 0)))


def measure_outcome(meter: Meter, tokens: Tokens) -> None:
    """reward/mean (of episodes that are over), len/mean and window/cut, over finite trajectories. Absent where there is
    none: 0 would be an outcome."""
    finite = tokens.of_fresh(tokens.finite)
    answered = finite & (tokens.length > 0)
    over = finite
    if (cut := tokens.columns.cut) is not None:
        over = finite & ~cut
        meter.put("window/cut", mean_of(cut.double(), finite))
    if bool(over.any()):
        meter.put("reward/mean", mean_of(tokens.reward, over))
    if bool(answered.any()):
        meter.put("len/mean", mean_of(tokens.length, answered))


def measure_signal(meter: Meter, tokens: Tokens, advantage: Tensor, zero_signal: Tensor) -> None:
    """advantage/*, group/zero_signal, entropy. advantage [T], zero_signal [I] bool."""
    ok = tokens.finite[tokens.trajectory]
    mean = mean_of(advantage, ok)
    meter.put("advantage/mean", mean)
    meter.put("advantage/std", mean_of((advantage - mean).square(), ok).sqrt())
    if len(advantage):
        meter.put("advantage/max", torch.where(ok, advantage.abs(), 0.0).max())
    meter.put("group/zero_signal", mean_of(zero_signal.double(), torch.ones_like(zero_signal)))
    if tokens.entropy is not None:
        meter.put("entropy", mean_of(tokens.entropy, ok))


def measure_teacher(meter: Meter, tokens: Tokens) -> None:
    """teacher/*: reverse KL to the teachers, and the share of tokens without one."""
    log_teacher = tokens.columns.log_teacher
    if log_teacher is None:
        return
    ok = tokens.finite[tokens.trajectory]
    known = ok & torch.isfinite(log_teacher)
    meter.put("teacher/missing", mean_of((~known).double(), ok))
    if bool(known.any()):
        meter.put("teacher/kl", mean_of(tokens.log_prob - log_teacher.double(), known))


def without_empty_buckets(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out the per-length counts that are 0: most reasons reject nothing in most buckets."""
    buckets: Iterable[str] = bucket_names()
    endings = tuple(f"/{name}" for name in buckets)
    return {name: v for name, v in metrics.items() if not (name.endswith(endings) and v == 0.0)}
