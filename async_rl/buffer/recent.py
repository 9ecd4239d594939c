"""Payloads of groups on their way to a batch, kept in memory as far as they fit (`Recent`): so a batch is not read back
from the file that it was just written to. What does not fit is read from there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter

from async_rl.trajectory.codec import Blob


@dataclass(slots=True)
class Recent:
    """Groups are here with all of their payloads, or not at all."""

    most_bytes: int
    """that are kept"""
    newest: int = -1
    """number of the newest group admitted; of groups up to it, some trajectories may be in the file alone"""
    groups: dict[int, dict[int, Blob]] = field(default_factory=dict)
    """group -> sample -> payload as it is stored"""
    formed: set[int] = field(default_factory=set)
    """those of `groups` that are in a batch: what arrives later is not"""
    num_bytes: int = 0

    def begin(self, group: int) -> None:
        """A group was admitted."""
        if group > self.newest:
            self.newest = group
            self.groups[group] = {}

    def add(self, group: int, sample: int, payload: Blob) -> None:
        """One was stored."""
        if (of_group := self.groups.get(group)) is None or group in self.formed:
            return
        if self.num_bytes + len(payload) > self.most_bytes:  # the oldest stay: they are in a batch first
            self.drop(group)
            return
        of_group[sample] = payload
        self.num_bytes += len(payload)

    def form(self, groups: Iterable[int]) -> None:
        """These are in a batch."""
        self.formed |= self.groups.keys() & set(groups)

    def drop(self, group: int) -> None:
        """Forget a group: it was refused, its batch was read, or it does not fit."""
        self.formed.discard(group)
        self.num_bytes -= sum(map(len, self.groups.pop(group, {}).values()))

    def payloads(self, group: int) -> list[tuple[int, Blob]] | None:
        """(sample, payload) of a group, in order; None: it is not here."""
        of_group = self.groups.get(group)
        return None if of_group is None else sorted(of_group.items(), key=itemgetter(0))
