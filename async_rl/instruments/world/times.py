"""How long things take in the world: drawn at random, or as a workload says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from async_rl.instruments.world.clock import Clock


class Times(Protocol):
    """Seconds that the processes need. 0: at once, in the same moment."""

    def start(self) -> float:
        """From a process's first message to its work."""
        ...

    def load(self) -> float:
        """Of new weights, in a generator."""
        ...

    def hand_in(self) -> float:
        """From the end of an episode to its sending."""
        ...

    def train(self) -> float:
        """Of one training step."""
        ...

    def publish(self) -> float: ...

    def save(self) -> float:
        """Of a checkpoint."""
        ...


@dataclass(frozen=True, slots=True)
class RandomTimes:
    """Exponential times around usual ones, for schedules of faults."""

    clock: Clock

    def start(self) -> float:
        return self.clock.about(0.5)

    def load(self) -> float:
        return self.clock.about(0.2)

    def hand_in(self) -> float:
        return 0.004

    def train(self) -> float:
        return self.clock.about(0.5)

    def publish(self) -> float:
        return self.clock.about(0.02)

    def save(self) -> float:
        return self.clock.about(0.1)
