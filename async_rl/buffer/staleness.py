"""How staleness is kept within its bound: what every policy answers, and the line of groups it looks at.

The policies themselves, pure objects all three: `pace`, `wait`, `drop`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import floor
from typing import ClassVar, Protocol, Self

from async_rl.errors import UserError


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


# -------------------- deadline
# What the policies share that give every group a deadline: the slots, and what may take a group's place.


@dataclass(frozen=True, slots=True, kw_only=True)
class ByDeadline:
    """A group started by a generator that holds version v has tokens of version >= v, hence the deadline v + k:
    trained at a step <= v + k, none of its tokens is staler than k. How the deadline is kept, `Wait` and `Drop` say.
    """

    groups_per_step: int
    """P, groups of one optimizer step"""
    max_staleness: int
    """k, steps"""
    pipeline_depth: float
    """batches in the pipeline (being generated, waiting or being trained), 1 .. k + 1"""

    def __post_init__(self) -> None:
        pipeline_slots(self.groups_per_step, self.max_staleness, self.pipeline_depth)

    @property
    def slots(self) -> int:
        return pipeline_slots(self.groups_per_step, self.max_staleness, self.pipeline_depth)

    def used(self, line: Line, *, step: int, version: int, published: int) -> int:
        """Groups in no batch, and in batches whose weights are not there yet."""
        return line.live + self.groups_per_step * max(0, step - published)

    def reissue(self, line: Line, group: int, *, step: int, version: int) -> bool:
        """Its deadline stays: the weights must be no older than those it was admitted with."""
        return version + self.max_staleness >= line.entry(group).deadline

    def refuse(self, *, version_min: int, step: int) -> str | None:
        return too_stale(version_min=version_min, step=step, max_staleness=self.max_staleness)

    def at_depth(self, depth: float) -> Self:
        return replace(self, pipeline_depth=depth)


# -------------------- pace
# Pace: bound staleness by holding generation back.


@dataclass(frozen=True, slots=True, kw_only=True)
class PacePolicy:
    """Bound staleness by pacing admission. Nothing is ever discarded for being slow.

    Batches take any `P` finished groups, each out of the window: of all groups not refused, in order
    of admission, those less than `W` places behind the oldest untrained one. So at most `W - 1` groups
    overtake any group, and a group admitted with `live` untrained groups before it while the buffer is
    about to form the batch of `step` is trained no later than at

        latest = step + floor((live + W - 1) / P)

    (refusals only bring it forward). Its tokens come from the weights the generator holds at admission
    or later ones, version >= v. Admitting only while `latest - v <= k` therefore keeps every token's
    staleness at its training step <= k, for any speeds, any order of arrival and any sequence of depths.

    Written as slots: `live + P * (step - v)` slots are in use (a group keeps its slot until the
    generator holds weights that were trained on it), out of `(k + 1) * P - (W - 1)`; the window's
    `ceil((W - 1) / P)` steps are thus taken off the admission bound.

    Example: `Pace(groups_per_step=16, max_staleness=1, pipeline_depth=2.0, window=1)`.
    """

    refills: ClassVar[bool] = False
    finish_frees: ClassVar[bool] = False

    groups_per_step: int
    """P, groups of one optimizer step"""
    max_staleness: int
    """k, steps"""
    pipeline_depth: float
    """batches in the pipeline (being generated, waiting or being trained), 1 .. k + 1"""
    window: int
    """W, groups"""

    def __post_init__(self) -> None:
        p, k = self.groups_per_step, self.max_staleness
        pipeline_slots(p, k, self.pipeline_depth)
        if not 1 <= self.window <= k * p + 1:
            raise UserError(
                f"staleness.window is {self.window} groups; with max_staleness {k} and {p} groups a step it must "
                f"lie between 1 and {k * p + 1}, else a batch could never fill"
            )

    @property
    def slots(self) -> int:
        """Most groups that may hold a slot at once."""
        bound = (self.max_staleness + 1) * self.groups_per_step - (self.window - 1)
        return min(bound, pipeline_slots(self.groups_per_step, self.max_staleness, self.pipeline_depth))

    def used(self, line: Line, *, step: int, version: int, published: int) -> int:
        """Slots in use as seen by a generator that holds `version`."""
        return line.live + self.groups_per_step * max(0, step - version)

    def latest_step(self, *, ahead: int, step: int) -> int:
        """Latest step at which a group with `ahead` untrained groups before it is trained."""
        return step + (ahead + self.window - 1) // self.groups_per_step

    def admit(self, line: Line, *, step: int, version: int, published: int) -> bool:
        return (
            self.used(line, step=step, version=version, published=published) < self.slots
            and self.latest_step(ahead=line.live, step=step) - version <= self.max_staleness
        )

    def reissue(self, line: Line, group: int, *, step: int, version: int) -> bool:
        return self.latest_step(ahead=line.ahead(group), step=step) - version <= self.max_staleness

    def select(self, line: Line, *, step: int) -> list[int] | None:
        if line.num_ready < self.groups_per_step:
            return None
        chosen: list[int] = []
        oldest_open: int | None = None  # place of the oldest group that is not finished
        for place, entry in enumerate(line.entries):
            if entry.trained:
                continue
            if not entry.finished:
                if oldest_open is None:
                    oldest_open = place
                continue
            if oldest_open is not None and place - oldest_open >= self.window:
                return None
            chosen.append(entry.group)
            if len(chosen) == self.groups_per_step:
                return chosen
        return None

    def held_up_by(self, line: Line, *, step: int) -> list[int]:
        """The oldest running group, where the window ends before P finished ones are found."""
        if line.num_ready < self.groups_per_step or self.select(line, step=step) is not None:
            return []
        return [next(e.group for e in line.entries if not e.finished and not e.trained)]

    def overdue(self, line: Line, *, step: int) -> list[int]:
        return []

    def refuse(self, *, version_min: int, step: int) -> str | None:
        return too_stale(version_min=version_min, step=step, max_staleness=self.max_staleness)

    def at_depth(self, depth: float) -> Self:
        return replace(self, pipeline_depth=depth)


# -------------------- wait
# Wait: bound staleness by letting the trainer wait for whoever is due.


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitPolicy(ByDeadline):
    """Nothing is discarded and there is no window: a batch takes any finished groups, those with the earliest
    deadline first, as long as all others can still be trained in time; else the trainer waits for a due one.

    A group started by a generator that holds version v has tokens of version >= v, hence the deadline v + k:
    trained at a step <= v + k, none of its tokens is staler than k. Let N(d) be the live groups with a deadline
    <= d while the batch of `step` is next. There are d - step + 1 batches of P groups up to step d, so all live
    groups can be trained in time only if

        N(d) <= P * (d - step + 1)   for every d >= step - 1,                                (*)

    and then they can: taking the earliest deadlines first does it. (*) always holds:
    - it holds at the start, N = 0, and neither a refusal nor a group that finishes with tokens younger than they
      might have been (its deadline moves back) makes any N(d) larger;
    - `admit` adds a group with deadline v + k only when (*) holds with it, for every d >= v + k;
    - `select` takes a batch only when (*) holds of the rest for step + 1. If every live group is finished, the P
      with the earliest deadlines will do: what they leave with a deadline <= d is max(0, N(d) - P), at most
      P * (d - step). So a batch that does not form waits for a running group, never for ever.
    With d = step - 1, (*) says that no live group is past its deadline when a batch forms: the bound. It does not
    depend on the depth of the pipeline, which may change at any time.

    Example: `Wait(groups_per_step=16, max_staleness=1, pipeline_depth=2.0)`.
    """

    refills: ClassVar[bool] = False
    finish_frees: ClassVar[bool] = True

    def admit(self, line: Line, *, step: int, version: int, published: int) -> bool:
        if self.used(line, step=step, version=version, published=published) >= self.slots:
            return False
        own = version + self.max_staleness
        return all(
            count + 1 <= self.groups_per_step * (deadline - step + 1)
            for deadline, count in due_by(line, own)
            if deadline >= own
        )

    def select(self, line: Line, *, step: int) -> list[int] | None:
        if line.num_ready < self.groups_per_step:
            return None
        chosen = earliest(line, self.groups_per_step)
        if self._missed(line, chosen, step):
            return None
        return sorted(chosen)

    def held_up_by(self, line: Line, *, step: int) -> list[int]:
        """The running groups that would be too late if P finished ones went without them."""
        if line.num_ready < self.groups_per_step:
            return []
        return self._missed(line, earliest(line, self.groups_per_step), step)

    def overdue(self, line: Line, *, step: int) -> list[int]:
        """None, unless a generator sent tokens older than the weights it said it held."""
        return [e.group for e in line.entries if e.finished and not e.trained and e.deadline < step]

    def _missed(self, line: Line, chosen: list[int], step: int) -> list[int]:
        """Running groups that could not all be trained in time were `chosen` the batch of `step`.

        Where (*) fails among finished groups alone, a generator has lied about its weights: waiting would not
        mend that, and what comes too late is refused."""
        taken = set(chosen)
        entries = sorted((e for e in line.entries if not e.trained and e.group not in taken), key=lambda e: e.deadline)
        running: list[int] = []
        for place, entry in enumerate(entries, start=1):
            if not entry.finished:
                running.append(entry.group)
            last_of_deadline = place == len(entries) or entries[place].deadline > entry.deadline
            if last_of_deadline and running and place > self.groups_per_step * (entry.deadline - step):
                return running
        return []


def due_by(line: Line, *more: int) -> list[tuple[int, int]]:
    """(deadline, live groups with that deadline or an earlier one), for each deadline there is and those of
    `more`, ascending."""
    found, total = [], 0
    for deadline in sorted({*line.due, *more}):
        total += line.due[deadline]
        found.append((deadline, total))
    return found


# -------------------- drop
# Drop: bound staleness by discarding what came too late, and asking the same problems again.


@dataclass(frozen=True, slots=True, kw_only=True)
class DropPolicy(ByDeadline):
    """Generators run ahead within the slots; no step waits for a slow group; what is too old is dropped.

    A batch takes any P finished groups, those with the earliest deadline first. A group started by a generator
    that holds version v has tokens of version >= v; when the batch of step v + k has been formed without it, it is
    overdue: finished or still running, it is dropped, gives its slot up at once, and its problem is asked again.
    (When it is finished, the version of its oldest token counts instead of v.) So every batch has P groups, all of
    them within the bound, and every problem is trained.

    What is trained is then biased towards short episodes *under given weights*: long ones are dropped more often
    and come from later attempts. The buffer reports by how much.

    Example: `Drop(groups_per_step=16, max_staleness=1, pipeline_depth=2.0)`.
    """

    refills: ClassVar[bool] = True
    finish_frees: ClassVar[bool] = False

    def admit(self, line: Line, *, step: int, version: int, published: int) -> bool:
        """Not what is too old before it begins."""
        used = self.used(line, step=step, version=version, published=published)
        return used < self.slots and version + self.max_staleness >= step

    def select(self, line: Line, *, step: int) -> list[int] | None:
        if line.num_ready < self.groups_per_step:
            return None
        chosen = earliest(line, self.groups_per_step)
        return sorted(chosen) if len(chosen) == self.groups_per_step else None

    def held_up_by(self, line: Line, *, step: int) -> list[int]:
        return []

    def overdue(self, line: Line, *, step: int) -> list[int]:
        return [e.group for e in line.entries if not e.trained and e.deadline < step]
