"""Training groups in order of admission: each ends in exactly one batch or one refusal."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from async_rl.buffer.group import Group
from async_rl.buffer.staleness import Entry, Pace, forget_trained, zero_signal


@dataclass(slots=True, kw_only=True)
class Ledger:
    """What is admitted, what is finished, what the next batch takes."""

    pace: Pace
    step: int = 0
    """batches formed so far = the step of the next batch"""
    next_group: int = 0
    """number of the group admitted next; evaluation groups draw from the same numbers"""
    order: list[Entry] = field(default_factory=list)
    """every group not refused, in order of admission, from the oldest untrained one on"""
    groups: dict[int, Group] = field(default_factory=dict)
    """those that are in no batch yet"""

    def number(self) -> int:
        """A group number that was never used."""
        self.next_group += 1
        return self.next_group - 1

    def admit(self, group: Group) -> None:
        """Put a new group, with the highest number so far, at the end."""
        assert not self.order or self.order[-1].group < group.group
        self.groups[group.group] = group
        self.order.append(Entry(group=group.group))

    def may_admit(self, version: int) -> bool:
        """May a generator holding `version` start one more group?"""
        return self.pace.admit(live=len(self.groups), step=self.step, version=version)

    def may_reissue(self, group: int, version: int) -> bool:
        """May a generator holding `version` take over this admitted group?"""
        ahead = sum(1 for entry in self.order[: self._place(group)] if not entry.trained)
        return self.pace.reissue(ahead=ahead, step=self.step, version=version)

    def finish(self, group: int) -> None:
        """All its samples are there: it may be trained."""
        self.order[self._place(group)].finished = True

    def refuse(self, group: int) -> None:
        """It will not be trained and frees its slot."""
        del self.groups[group]
        del self.order[self._place(group)]
        forget_trained(self.order)

    def choose(self) -> list[int] | None:
        """The groups of the next batch, or None while it cannot be filled."""
        return self.pace.select(self.order)

    def too_stale(self, chosen: list[int]) -> list[tuple[int, str]]:
        """(group, reason) of those that may not be trained now, whatever admission believed."""
        found = []
        for group in chosen:
            reason = self.pace.refuse(version_min=self.groups[group].version_min, step=self.step)
            if reason is not None:
                found.append((group, reason))
        return found

    def form_batch(self, chosen: list[int]) -> None:
        """These groups are the batch of `step`; the next step begins."""
        for group in chosen:
            self.order[self._place(group)].trained = True
            del self.groups[group]
        forget_trained(self.order)
        self.step += 1

    @property
    def num_ready(self) -> int:
        """Groups that wait for a batch."""
        return sum(1 for entry in self.order if entry.finished and not entry.trained)

    def _place(self, group: int) -> int:
        place = bisect_left(self.order, group, key=lambda entry: entry.group)
        assert self.order[place].group == group
        return place


def untrainable(group: Group, *, drop_zero_signal: bool) -> str | None:
    """Why a complete group cannot be trained, or None."""
    usable = group.usable
    if len(usable) < min(2, group.size):
        return f"{group.size - len(usable)} of {group.size} trajectories failed"
    if drop_zero_signal and zero_signal(sample.reward for sample in usable):
        return "zero_signal"
    return None
