"""A group on its way from admission to a batch: which samples are there, which are still out."""

from __future__ import annotations

from dataclasses import dataclass, field

from async_rl.trajectory import Split, Trajectory
from async_rl.wire.messages import Permit


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the buffer remembers of one trajectory; the tokens are in the store."""

    reward: float
    version_min: int
    version_max: int
    length: int
    policy_length: int
    failed: bool


@dataclass(slots=True, kw_only=True)
class Group:
    """The trajectories of one prompt that are compared with each other."""

    group: int
    problem: int
    split: Split
    size: int
    """samples asked for"""
    seed: int
    temperature: float
    admitted_at: float
    """seconds, the buffer's clock"""
    admitted_version: int
    position: int = -1
    """in the prompt order; -1: none (evaluation)"""
    attempt: int = 0
    """how often a group of this position was dropped before"""
    holder: bytes | None = None
    """the generator that works on it; None while it waits for one"""
    samples: dict[int, Sample] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    """samples of which finished turns are saved"""
    holders: set[bytes] = field(default_factory=set)
    """every generator it was given to"""
    oldest_held: int = 0
    """the oldest weights of those generators when it was given to them"""
    restored: bool = False
    """read from the store: to whom it was given before is not known, nor which weights those held"""

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.size) if i not in self.samples)

    @property
    def complete(self) -> bool:
        return len(self.samples) == self.size

    @property
    def usable(self) -> list[Sample]:
        """Samples that did not fail."""
        return [s for s in self.samples.values() if not s.failed]

    @property
    def version_min(self) -> int:
        """Version of the oldest policy token of the usable samples; -1 when there is none."""
        return min((s.version_min for s in self.usable if s.version_min >= 0), default=-1)

    def give(self, peer: bytes, version: int) -> None:
        """To a generator that holds `version`."""
        self.holder = peer
        if not self.restored:
            self.oldest_held = version if not self.holders else min(self.oldest_held, version)
        self.holders.add(peer)

    def permit(self) -> Permit:
        """The right to generate what is missing."""
        return Permit(
            group=self.group,
            problem=self.problem,
            split=self.split,
            samples=self.missing,
            seed=self.seed,
            temperature=self.temperature,
        )

    def arrive(self, trajectory: Trajectory) -> bool:
        """Take in one trajectory; False when that sample is already here."""
        if trajectory.sample in self.samples:
            return False
        self.samples[trajectory.sample] = Sample(
            reward=trajectory.reward,
            version_min=trajectory.version_min,
            version_max=trajectory.version_max,
            length=len(trajectory.tokens),
            policy_length=trajectory.num_policy_tokens,
            failed=trajectory.failed,
        )
        return True
