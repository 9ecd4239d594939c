"""What the objective remembers from step to step. Plain numbers, part of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshNoise:
    """Noise of fresh units of one length bucket, counted by size (`reference.EDGES`): units whose tokens were sampled
    by the current version."""

    bins: tuple[tuple[int, float], ...] = ()
    """(bin, units in it), ascending, units above 0"""

    @property
    def count(self) -> float:
        """units"""
        return sum(many for _, many in self.bins)

    def plus(self, other: FreshNoise) -> FreshNoise:
        """The units of both."""
        units = dict(self.bins)
        for place, many in other.bins:
            units[place] = units.get(place, 0.0) + many
        return FreshNoise(bins=tuple(sorted(units.items())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Controlled:
    """A number of the recipe that follows a metric."""

    value: float
    passed: int = 0
    """updates in a row that the metric has passed its target"""
    held: float | None = None
    """the value behind one that is 0 for now (law step)"""

    def to_list(self) -> list[float]:
        return [self.value, self.passed] if self.held is None else [self.value, self.passed, self.held]

    @staticmethod
    def from_list(numbers: Sequence[float]) -> Controlled:
        held = numbers[2] if len(numbers) > 2 else None
        return Controlled(value=numbers[0], passed=int(numbers[1]), held=held)


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """The mean of a metric over all updates so far."""

    mean: float
    updates: int

    def plus(self, value: float) -> Past:
        """With one more."""
        updates = self.updates + 1
        return Past(mean=self.mean + (value - self.mean) / updates, updates=updates)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveState:
    """Start with `ObjectiveState()`; pass on what each step returns."""

    fresh: tuple[FreshNoise, ...] = ()
    """of the newest fresh data, by length bucket; empty before the first (ESS reference `calibrated`)"""
    begun: tuple[FreshNoise, ...] = ()
    """of the run's first fresh data, alike"""
    bias_size: float | None = None
    """running size of the clipping bias (kappa `guarded`); None before the first clipped token"""
    kl_coefficient: float | None = None
    """adapted beta; None: the recipe's"""
    entropy: Past | None = None
    """of the policy's tokens, where the recipe has a band around it; None before the first update"""
    controlled: Mapping[str, Controlled] = field(default_factory=dict)
    """numbers of the recipe that follow a metric, by name"""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """what a recipe function of the user's own remembers, by name"""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for a JSON or msgpack checkpoint."""
        return {
            "noise": [_to_lists(self.fresh), _to_lists(self.begun)],
            "bias_size": self.bias_size,
            "kl_coefficient": self.kl_coefficient,
            **({"numbers": dict(self.numbers)} if self.numbers else {}),
            **({"entropy": [self.entropy.mean, self.entropy.updates]} if self.entropy else {}),
            **({"controlled": {n: c.to_list() for n, c in self.controlled.items()}} if self.controlled else {}),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ObjectiveState:
        """The inverse of `to_dict`, exactly. Versions up to 0.3.0 kept no noise by size; the reference begins anew."""
        fresh, begun = values.get("noise", ((), ()))
        return ObjectiveState(
            fresh=_from_lists(fresh),
            begun=_from_lists(begun),
            bias_size=values["bias_size"],
            kl_coefficient=values["kl_coefficient"],
            numbers=values.get("numbers", {}),
            entropy=Past(mean=values["entropy"][0], updates=values["entropy"][1]) if "entropy" in values else None,
            controlled={n: Controlled.from_list(c) for n, c in values.get("controlled", {}).items()},
        )


def _to_lists(records: tuple[FreshNoise, ...]) -> list[list[list[float]]]:
    return [[[place, many] for place, many in record.bins] for record in records]


def _from_lists(records: Sequence[Sequence[Sequence[float]]]) -> tuple[FreshNoise, ...]:
    return tuple(FreshNoise(bins=tuple((int(place), many) for place, many in record)) for record in records)
