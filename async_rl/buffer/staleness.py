"""How staleness is kept within its bound: what every policy answers, and the line of groups it looks at.

The policies themselves, pure objects all three: `pace`, `wait`, `drop`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import floor
from typing import Literal, Protocol, Self

from async_rl.errors import UserError

PolicyName = Literal["pace", "wait", "drop"]


class Policy(Protocol):
    """Who may start, what may be trained, what must be refused. No I/O, no clock, no state.

    `version` is that of the weights a generator holds: a group it starts has tokens of that version or later
    ones. `step` is that of the next batch, `published` the newest version there is.
    """

    @property
    def groups_per_step(self) -> int:
        """P, groups of one optimizer step"""
        ...

    @property
    def max_staleness(self) -> int:
        """k, steps"""
        ...

    @property
    def pipeline_depth(self) -> float:
        """batches in the pipeline (being generated, waiting or being trained), 1 .. k + 1"""
        ...

    @property
    def refills(self) -> bool:
        """Whether the problem of a group refused for its age is asked again."""
        ...

    @property
    def finish_frees(self) -> bool:
        """Whether more may be admitted because a group is finished."""
        ...

    @property
    def slots(self) -> int:
        """Most groups that may hold a slot at once."""
        ...

    def used(self, line: Line, *, step: int, version: int, published: int) -> int:
        """Slots in use as seen by a generator that holds `version`."""
        ...

    def admit(self, line: Line, *, step: int, version: int, published: int) -> bool:
        """May a generator holding `version` start one more group?"""
        ...

    def reissue(self, line: Line, group: int, *, step: int, version: int) -> bool:
        """May a generator holding `version` take over an admitted group of the line at its old place?"""
        ...

    def select(self, line: Line, *, step: int) -> list[int] | None:
        """The groups of the batch of `step` in order of admission, or None while it cannot be filled."""
        ...

    def held_up_by(self, line: Line, *, step: int) -> list[int]:
        """Running groups without which the batch of `step` is not formed although P others are finished."""
        ...

    def overdue(self, line: Line, *, step: int) -> list[int]:
        """Groups, finished or running, that can no longer be trained in time and give their slot up now."""
        ...

    def refuse(self, *, version_min: int, step: int) -> str | None:
        """Why a group whose oldest token is of `version_min` may not be trained at `step`, or None. Asked when
        a batch is formed, of what arrived, whatever admission believed."""
        ...

    def at_depth(self, depth: float) -> Self:
        """The same policy with this pipeline depth, 1 .. max_staleness + 1."""
        ...


@dataclass(slots=True, kw_only=True)
class Entry:
    """A group in order of admission, as far as a policy is concerned."""

    group: int
    deadline: int
    """latest step at which the oldest token it may have is no staler than allowed"""
    finished: bool = False
    trained: bool = False


@dataclass(slots=True, kw_only=True)
class Line:
    """Every group not refused, in order of admission, from the oldest untrained one on."""

    entries: list[Entry] = field(default_factory=list)
    live: int = 0
    """groups that are in no batch yet"""
    num_ready: int = 0
    """of them, those that are finished and wait for a batch"""
    due: Counter[int] = field(default_factory=Counter)
    """live groups by deadline"""

    def add(self, entry: Entry) -> None:
        """A group with the highest number so far, at the end."""
        assert not self.entries or self.entries[-1].group < entry.group
        self.entries.append(entry)
        if not entry.trained:
            self._count(entry.deadline, 1)

    def finish(self, group: int, *, deadline: int) -> None:
        """All its samples are there, and with them the true deadline."""
        entry = self.entry(group)
        entry.finished = True
        self.num_ready += 1
        self._count(entry.deadline, -1)
        entry.deadline = deadline
        self._count(deadline, 1)

    def refuse(self, group: int) -> None:
        """It leaves the line."""
        place = self._place(group)
        self._count(self.entries[place].deadline, -1)
        self.num_ready -= self.entries[place].finished
        del self.entries[place]
        self._forget_trained()

    def train(self, groups: Iterable[int]) -> None:
        """These are in a batch."""
        for group in groups:
            entry = self.entry(group)
            entry.trained = True
            self.num_ready -= 1
            self._count(entry.deadline, -1)
        self._forget_trained()

    def entry(self, group: int) -> Entry:
        return self.entries[self._place(group)]

    def ahead(self, group: int) -> int:
        """Untrained groups before it."""
        return sum(1 for entry in self.entries[: self._place(group)] if not entry.trained)

    def _place(self, group: int) -> int:
        place = bisect_left(self.entries, group, key=lambda entry: entry.group)
        assert self.entries[place].group == group
        return place

    def _count(self, deadline: int, change: int) -> None:
        self.live += change
        self.due[deadline] += change
        if not self.due[deadline]:
            del self.due[deadline]

    def _forget_trained(self) -> None:
        """Drop the trained groups before the oldest untrained one."""
        keep = next((i for i, entry in enumerate(self.entries) if not entry.trained), len(self.entries))
        del self.entries[:keep]


def earliest(line: Line, number: int) -> list[int]:
    """At most so many finished groups, those with the earliest deadline first, then those admitted first."""
    ready = [entry for entry in line.entries if entry.finished and not entry.trained]
    return [entry.group for entry in sorted(ready, key=lambda e: e.deadline)[:number]]


def pipeline_slots(groups_per_step: int, max_staleness: int, pipeline_depth: float) -> int:
    """Slots of a pipeline so many batches deep. Raises UserError for what no policy can keep."""
    p, k = groups_per_step, max_staleness
    if p < 1:
        raise UserError(f"batch.groups_per_step is {p}; it must be at least 1")
    if k < 0:
        raise UserError(f"staleness.max_staleness is {k}; it must be at least 0")
    if not 1 <= pipeline_depth <= k + 1:
        raise UserError(
            f"staleness.pipeline_depth is {pipeline_depth:g}; it must lie between 1 (one batch at a time) "
            f"and max_staleness + 1 = {k + 1}"
        )
    return floor(pipeline_depth * p + 1e-9)  # a depth that is a number of slots divided by P


def too_stale(*, version_min: int, step: int, max_staleness: int) -> str | None:
    """Why tokens of `version_min` (-1: there is none) may not be trained at `step`, or None."""
    if version_min >= 0 and step - version_min > max_staleness:
        return f"stale: version {version_min} at step {step} exceeds max_staleness {max_staleness}"
    return None
