"""A value as the mean of a distribution over returns, trained by cross-entropy (docs/algorithms.md#value-distribution).

Shapes: n rows, h atoms or bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from async_rl.config import CriticSettings

SIGMA = 0.75
"""width of HL-Gauss' normal distribution, in bins (Farebrother et al., arXiv 2403.03950)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Where returns may lie: `two_hot` has atoms at equal distances from `low` to `high`, `hl_gauss` bins between."""

    kind: str
    bins: int
    low: float
    high: float

    @staticmethod
    def of(settings: CriticSettings) -> Distribution:
        return Distribution(kind=settings.loss, bins=settings.bins, low=settings.low, high=settings.high)

    def centres(self, like: Tensor) -> Tensor:
        """Atoms, or the bins' middles, [h]; device and dtype of `like`."""
        inset = (self.high - self.low) / self.bins / 2 if self.kind == "hl_gauss" else 0.0
        return torch.linspace(self.low + inset, self.high - inset, self.bins, device=like.device, dtype=like.dtype)

    def mean(self, logits: Tensor) -> Tensor:
        """[n, h] -> [n]"""
        return (torch.softmax(logits, -1) * self.centres(logits)).sum(-1)

    def spread(self, target: Tensor) -> Tensor:
        """The distribution that stands for each target, [n] -> [n, h]: of two atoms with the target as their mean, or
        the normal distribution around it, cut at the ends."""
        target = target.clamp(self.low, self.high)[:, None]
        if self.kind == "two_hot":
            gap = (self.high - self.low) / (self.bins - 1)
            return (1 - (target - self.centres(target)).abs() / gap).clamp(min=0.0)
        edges = torch.linspace(self.low, self.high, self.bins + 1, device=target.device, dtype=target.dtype)
        sigma = SIGMA * (self.high - self.low) / self.bins
        below = torch.special.ndtr((edges - target) / sigma)
        return (below[:, 1:] - below[:, :-1]) / (below[:, -1:] - below[:, :1])

    def loss(self, logits: Tensor, target: Tensor, share: Tensor) -> Tensor:
        """sum_n share * cross-entropy of the target's distribution: [n, h], [n], [n] -> []"""
        wanted = self.spread(target.to(logits.dtype))
        return -(share * (wanted * torch.log_softmax(logits, -1)).sum(-1)).sum()

    def outside(self, target: Tensor) -> float:
        """Share of the targets [n] that the range does not hold."""
        return float(((target < self.low) | (target > self.high)).double().mean()) if len(target) else 0.0
