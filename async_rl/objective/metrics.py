"""The numbers that say how far off policy a batch was and what the objective did about it.

Keys and formulas: docs/metrics.md. Everything is gathered as tensors and read with one transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from async_rl.objective.tokens import Tokens, segment_max, segment_min
from async_rl.objective.trust import Selection, Trust, bucket_names, length_bucket


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
    """Mean over `mask`, 0 where it is empty. []"""
    chosen = mask.to(values.dtype)
    return torch.where(mask, values, 0.0).sum() / chosen.sum().clamp(min=1.0)


def quantile(values: Tensor, share: float) -> Tensor:
    """The smallest value that at least `share` of the entries do not exceed; 0 when there is none. []"""
    if len(values) == 0:
        return values.new_zeros(())
    return values.kthvalue(max(1, -int(-share * len(values) // 1)))[0]


def measure_ratios(meter: Meter, tokens: Tokens, log_weight_cap: float | None) -> None:
    """is/*, kl/behaviour*, kl/mismatch and ess/ratio_clipped, over tokens of finite trajectories."""
    ok = tokens.finite[tokens.trajectory]
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
    total = tokens.sum_trajectory(log_ratio)[tokens.finite & (tokens.length > 0)]
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
    meter.put("lag/mean", lag.mean())
    meter.put("lag/max", lag.max())
    meter.put("lag/p95", quantile(lag, 0.95))
    highest = segment_max(lag, tokens.trajectory, tokens.num_trajectories, empty=0.0)
    lowest = segment_min(lag, tokens.trajectory, tokens.num_trajectories, empty=0.0)
    meter.put("lag/span", mean_of(highest - lowest, tokens.length > 0))


def measure_trust(meter: Meter, tokens: Tokens, trust: Trust, keep: Tensor, advantage: Tensor) -> None:
    """clip/*: shares of kept tokens whose weight the trust rule changed."""
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
    kept_lengths = mean_of(tokens.length, selection.keep & (tokens.length > 0))
    meter.put("len/mean", mean_of(tokens.length, tokens.length > 0))
    meter.put("len/kept", kept_lengths)
    meter.put("len/rejected", mean_of(tokens.length, rejected & (tokens.length > 0)))


def measure_signal(meter: Meter, tokens: Tokens, advantage: Tensor, zero_signal: Tensor) -> None:
    """reward/mean, advantage/*, group/zero_signal, entropy."""
    ok = tokens.finite[tokens.trajectory]
    mean = mean_of(advantage, ok)
    meter.put("reward/mean", mean_of(tokens.reward, tokens.rewarded))
    meter.put("advantage/mean", mean)
    meter.put("advantage/std", mean_of((advantage - mean).square(), ok).sqrt())
    if len(advantage):
        meter.put("advantage/max", torch.where(ok, advantage.abs(), 0.0).max())
    meter.put("group/zero_signal", mean_of(zero_signal.double(), torch.ones_like(zero_signal)))
    if tokens.entropy is not None:
        meter.put("entropy", mean_of(tokens.entropy, ok))


def without_empty_buckets(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out the per-length counts that are 0: most reasons reject nothing in most buckets."""
    buckets: Iterable[str] = bucket_names()
    endings = tuple(f"/{name}" for name in buckets)
    return {name: v for name, v in metrics.items() if not (name.endswith(endings) and v == 0.0)}
