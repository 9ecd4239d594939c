"""What the objective remembers from step to step. Plain numbers, part of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshMoments:
    """Decayed sums over fresh samples of one length bucket: sums of log-ratios of tokens sampled by the
    current version."""

    count: float = 0.0
    total: float = 0.0
    """sum of log-weights, nats"""
    square: float = 0.0
    """sum of squared log-weights"""
    length: float = 0.0
    """sum of lengths, tokens"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveState:
    """Start with `ObjectiveState()`; pass on what each step returns."""

    fresh: tuple[FreshMoments, ...] = ()
    """by length bucket; empty before the first fresh data (ESS reference `calibrated`)"""
    bias_size: float | None = None
    """running size of the clipping bias (kappa `guarded`); None before the first clipped token"""
    kl_coefficient: float | None = None
    """adapted beta; None: the recipe's"""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """what a recipe function of the user's own remembers, by name"""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for a JSON or msgpack checkpoint."""
        return {
            "fresh": [[m.count, m.total, m.square, m.length] for m in self.fresh],
            "bias_size": self.bias_size,
            "kl_coefficient": self.kl_coefficient,
            **({"numbers": dict(self.numbers)} if self.numbers else {}),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ObjectiveState:
        """The inverse of `to_dict`, exactly."""
        return ObjectiveState(
            fresh=tuple(FreshMoments(count=c, total=t, square=s, length=n) for c, t, s, n in values["fresh"]),
            bias_size=values["bias_size"],
            kl_coefficient=values["kl_coefficient"],
            numbers=values.get("numbers", {}),
        )
