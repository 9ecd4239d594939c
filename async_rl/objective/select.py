"""Which trajectories are left out, and why. Every rejection is counted by reason and length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from async_rl.objective.ratio import log_denominator
from async_rl.objective.recipe import Recipe
from async_rl.objective.segment import segment_max, segment_min
from async_rl.objective.tokens import Tokens
from async_rl.trajectory.length import LENGTH_BUCKETS, bucket_names

__all__ = ["LENGTH_BUCKETS", "Selection", "bucket_names", "length_bucket", "select"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    keep: Tensor  # [trajectories] bool
    rejected: Mapping[str, Tensor]
    """reason -> [trajectories] bool; a trajectory may have several"""


def length_bucket(length: Tensor) -> Tensor:
    """Bucket index of each length, int64."""
    ends = torch.tensor(LENGTH_BUCKETS, dtype=length.dtype, device=length.device)
    return torch.bucketize(length, ends, right=True)


def select(tokens: Tokens, recipe: Recipe, advantage: Tensor, zero_signal: Tensor) -> Selection:
    """Apply the recipe's selection. `advantage` [tokens], `zero_signal` [trajectories] bool."""
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
    if settings.drop_zero_signal:
        largest = segment_max(advantage.abs(), tokens.trajectory, tokens.num_trajectories, empty=0.0)
        baselined = recipe.advantage.baseline == "opob"
        rejected["zero_signal"] = zero_signal if baselined else largest == 0
    keep = torch.ones_like(tokens.finite)
    for mask in rejected.values():
        keep = keep & ~mask
    return Selection(keep=keep, rejected=rejected)


def _outside(log_ratio: Tensor, low: float, high: float) -> Tensor:
    outside = torch.zeros_like(log_ratio, dtype=torch.bool)
    if low > 0:
        outside |= log_ratio < log(low)
    if high > 0:
        outside |= log_ratio > log(high)
    return outside
