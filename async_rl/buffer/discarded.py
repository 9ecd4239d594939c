"""What was dropped for its age, beside what was trained: how long the episodes were."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from async_rl.buffer.group import Group
from async_rl.trajectory import Trajectory
from async_rl.trajectory.length import bucket_names, bucket_of
from async_rl.wire.messages import ABANDONED

MOST_RUNNING = 4096
"""groups dropped while they ran that are remembered until the rest of them arrives"""


@dataclass(slots=True, kw_only=True)
class Lengths:
    """Policy tokens of many trajectories."""

    trajectories: int = 0
    tokens: int = 0
    buckets: Counter[int] = field(default_factory=Counter)
    """trajectories by length (trajectory/length.py)"""

    def add(self, policy_length: int) -> None:
        self.trajectories += 1
        self.tokens += policy_length
        self.buckets[bucket_of(policy_length)] += 1

    @property
    def mean(self) -> float:
        return self.tokens / self.trajectories if self.trajectories else 0.0


@dataclass(slots=True, kw_only=True)
class Discarded:
    """The length bias of dropping. Trajectories without a policy token and failed ones are in neither count.

    A trajectory that was dropped while it ran counts with what was generated of it: its true length is larger,
    and so is the bias.
    """

    dropped: Lengths = field(default_factory=Lengths)
    refused: Lengths = field(default_factory=Lengths)
    """groups refused for other reasons than their age"""
    trained: Lengths = field(default_factory=Lengths)
    running: OrderedDict[int, Group] = field(default_factory=OrderedDict)
    """dropped while they ran: a generator still owes what there is of their missing samples"""

    def train(self, group: Group) -> None:
        """It is in a batch."""
        for sample in group.usable:
            if sample.policy_length:
                self.trained.add(sample.policy_length)

    def refuse(self, group: Group, *, stale: bool, owed: bool) -> None:
        """`stale`: for its age. `owed`: a generator still has its missing samples and will send what there is."""
        lengths = self.dropped if stale else self.refused
        for sample in group.usable:
            if sample.policy_length:
                lengths.add(sample.policy_length)
        if owed and group.missing:
            self.running[group.group] = group
            if len(self.running) > MOST_RUNNING:
                self.running.popitem(last=False)

    def late(self, trajectory: Trajectory) -> bool:
        """One of a group in `running` has come. False when that sample is already here."""
        group = self.running[trajectory.group]
        if not group.arrive(trajectory):
            return False
        if group.complete:
            del self.running[group.group]
        if trajectory.num_policy_tokens and (not trajectory.failed or trajectory.reason == ABANDONED):
            self.dropped.add(trajectory.num_policy_tokens)
        return True

    def restore(self, lengths: Iterable[tuple[str, int, int, int]]) -> None:
        """From (what became of them, bucket, trajectories, policy tokens) of all that was stored."""
        kinds = {"dropped": self.dropped, "refused": self.refused, "trained": self.trained}
        for kind, bucket, trajectories, tokens in lengths:
            found = kinds[kind]
            found.trajectories += trajectories
            found.tokens += tokens
            found.buckets[bucket] += trajectories

    @property
    def mean_refused(self) -> float:
        """Policy tokens of refused trajectories, whatever the reason."""
        both = self.dropped, self.refused
        return sum(lengths.tokens for lengths in both) / max(1, sum(lengths.trajectories for lengths in both))

    def numbers(self) -> dict[str, float]:
        """Since the start of the run, as metrics."""
        dropped, trained = self.dropped, self.trained
        means = {"drop/len_trained": trained.mean}
        if dropped.trajectories:
            means["drop/len_mean"] = dropped.mean
        if dropped.trajectories and trained.trajectories:
            means["drop/len_bias"] = dropped.mean / trained.mean
        named = list(enumerate(bucket_names()))
        return {
            "drop/trajectories": dropped.trajectories,
            "drop/tokens": dropped.tokens,
            **means,
            **{f"drop/{name}": dropped.buckets[i] for i, name in named if dropped.buckets[i]},
            **{f"drop/trained_{name}": trained.buckets[i] for i, name in named if trained.buckets[i]},
        }
