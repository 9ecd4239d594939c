"""How staleness is kept within its bound: the policies `pace`, `wait` and `drop`, and the queue of slots they read.

A policy is pure: it is asked who may start a group, which groups a batch takes and which it waits for. The ledger
(ledger.py) keeps the queue and applies the answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import floor
from typing import ClassVar, Self

from async_rl.errors import UserError

# ---------------------------------------------------------------- queue of slots


@dataclass(slots=True, kw_only=True)
class Slot:
    """A group in order of admission, as far as a policy is concerned. It holds its slot until it is in a batch or
    refused."""

    group: int
    deadline: int
    """latest step at which the oldest token it may have is no staler than allowed"""
    finished: bool = False
    trained: bool = False
    """it is in a batch"""


@dataclass(slots=True, kw_only=True)
class SlotQueue:
    """Every group that was not refused, in order of admission, from the oldest one that is in no batch on. Groups
    behind that one that are in a batch already stay in it: they count as places of the window."""

    entries: list[Slot] = field(default_factory=list)
    live: int = 0
    """groups that are in no batch yet"""
    num_ready: int = 0
    """of them, those that are finished and wait for a batch"""
    due: Counter[int] = field(default_factory=Counter)
    """live groups by deadline"""

    def add(self, slot: Slot) -> None:
        """Append a group; its number is the highest so far."""
        assert not self.entries or self.entries[-1].group < slot.group
        self.entries.append(slot)
        if not slot.trained:
            self._count(slot.deadline, 1)

    def finish(self, group: int, *, deadline: int) -> None:
        """All its samples are there, and with them the true deadline."""
        slot = self.slot(group)
        slot.finished = True
        self.num_ready += 1
        self._count(slot.deadline, -1)
        slot.deadline = deadline
        self._count(deadline, 1)

    def refuse(self, group: int) -> None:
        """Remove a group."""
        place = self._place(group)
        self._count(self.entries[place].deadline, -1)
        self.num_ready -= self.entries[place].finished
        del self.entries[place]
        self._forget_trained()

    def train(self, groups: Iterable[int]) -> None:
        """These groups are in a batch."""
        for group in groups:
            slot = self.slot(group)
            slot.trained = True
            self.num_ready -= 1
            self._count(slot.deadline, -1)
        self._forget_trained()

    def slot(self, group: int) -> Slot:
        return self.entries[self._place(group)]

    def ahead(self, group: int) -> int:
        """Live groups admitted before it."""
        return sum(1 for slot in self.entries[: self._place(group)] if not slot.trained)

    def earliest(self, number: int) -> list[int]:
        """At most `number` finished groups, those with the earliest deadline first, then those admitted first."""
        ready = [slot for slot in self.entries if slot.finished and not slot.trained]
        return [slot.group for slot in sorted(ready, key=lambda slot: slot.deadline)[:number]]

    def due_by(self, *more: int) -> list[tuple[int, int]]:
        """(deadline, live groups with that deadline or an earlier one), for each deadline there is and those of
        `more`, ascending."""
        found, total = [], 0
        for deadline in sorted({*self.due, *more}):
            total += self.due[deadline]
            found.append((deadline, total))
        return found

    def _place(self, group: int) -> int:
        place = bisect_left(self.entries, group, key=lambda slot: slot.group)
        assert self.entries[place].group == group
        return place

    def _count(self, deadline: int, change: int) -> None:
        self.live += change
        self.due[deadline] += change
        if not self.due[deadline]:
            del self.due[deadline]

    def _forget_trained(self) -> None:
        """Remove the groups in batches before the oldest live one."""
        keep = next((i for i, slot in enumerate(self.entries) if not slot.trained), len(self.entries))
        del self.entries[:keep]


# ---------------------------------------------------------------- what all policies answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(ABC):
    """Who may start a group, what is trained, what is refused. No I/O, no clock, no state.

    In every question, `version` is that of the weights a generator holds: a group it starts has tokens of that
    version or later ones. `step` is the step of the next batch, `published` the newest version there is. Everything is
    counted in groups, so that nothing here depends on their sizes, which may differ (`sampler.samples`).
    """

    refills: ClassVar[bool]
    """whether the problem of a group refused for its age is asked again"""
    finish_frees: ClassVar[bool]
    """whether more may be admitted because a group is finished"""

    groups_per_step: int
    """P, groups of one optimizer step"""
    max_staleness: int
    """k, steps"""
    pipeline_depth: float
    """batches in the pipeline (being generated, waiting or being trained), 1 .. k + 1"""

    def __post_init__(self) -> None:
        """Raises UserError for settings that no policy can keep."""
        pipeline_slots(self.groups_per_step, self.max_staleness, self.pipeline_depth)

    @property
    def slots(self) -> int:
        """Most groups that may hold a slot at once."""
        return pipeline_slots(self.groups_per_step, self.max_staleness, self.pipeline_depth)

    @abstractmethod
    def used(self, queue: SlotQueue, *, step: int, version: int, published: int) -> int:
        """Slots in use as seen by a generator that holds `version`."""

    @abstractmethod
    def admit(self, queue: SlotQueue, *, step: int, version: int, published: int) -> bool:
        """Whether a generator that holds `version` may start one more group."""

    @abstractmethod
    def reissue(self, queue: SlotQueue, group: int, *, step: int, version: int) -> bool:
        """Whether a generator that holds `version` may take over an admitted group at its old place."""

    @abstractmethod
    def select(self, queue: SlotQueue, *, step: int) -> list[int] | None:
        """The groups of the batch of `step` in order of admission, or None while it cannot be filled."""

    @abstractmethod
    def held_up_by(self, queue: SlotQueue, *, step: int) -> list[int]:
        """Running groups without which the batch of `step` is not formed although P others are finished."""

    @abstractmethod
    def overdue(self, queue: SlotQueue, *, step: int) -> list[int]:
        """Groups, finished or running, that can no longer be trained in time and give their slot up now."""

    def refuse(self, *, version_min: int, step: int) -> str | None:
        """Why a group whose oldest token is of `version_min` (-1: it has none) may not be trained at `step`, or None.
        Asked of what arrived when a batch is formed, whatever was admitted."""
        if version_min >= 0 and step - version_min > self.max_staleness:
            return f"stale: version {version_min} at step {step} exceeds max_staleness {self.max_staleness}"
        return None

    def at_depth(self, depth: float) -> Self:
        """The same policy with this pipeline depth, 1 .. max_staleness + 1."""
        return replace(self, pipeline_depth=depth)


def pipeline_slots(groups_per_step: int, max_staleness: int, pipeline_depth: float) -> int:
    """Slots of a pipeline `pipeline_depth` batches deep. Raises UserError for what no policy can keep."""
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


# ---------------------------------------------------------------- pace: hold generation back


@dataclass(frozen=True, slots=True, kw_only=True)
class PacePolicy(Policy):
    """Bounds staleness by pacing admission. Nothing is ever discarded for being slow.

    A batch takes any P finished groups inside the window: of the queue, those less than W places behind the oldest
    live group. So at most W - 1 groups overtake any group, and a group admitted with `live` live groups before it,
    while the batch of `step` is next, is trained no later than at

        latest = step + floor((live + W - 1) / P)

    (refusals only bring it forward). Its tokens come from the weights that the generator holds at admission or later
    ones, version >= v. Admitting only while `latest - v <= k` therefore keeps the staleness of every token at its
    training step <= k, for any speeds, any order of arrival and any sequence of depths.

    The same in slots: `live + P * (step - v)` slots are in use (a group is charged to a generator until the generator
    holds weights that were trained on it), out of `(k + 1) * P - (W - 1)`; the window thus takes `ceil((W - 1) / P)`
    steps off the bound. The depth of the pipeline may lower the number of slots further.

    Example: P = 2 groups a step, k = 1, W = 2, depth = 2 batches. There are min(2 * 2 - 1, 2 * 2) = 3 slots. A
    generator asks for one permit after the other; `used`, `latest` and the answer follow from the first four columns:

        what happened before              step  holds  live  used  latest  answer
        the run begins                       0     v0     0     0       0  A
        nothing                              0     v0     1     1       1  B
        nothing                              0     v0     2     2       1  C
        nothing                              0     v0     3     3       2  no: every slot is in use
        A and C finish: batch 0 is A, C      1     v0     1     3       2  no: A and C are charged until v1 is held
        the generator loads v1               1     v1     1     1       2  D
        nothing                              1     v1     2     2       2  E
        nothing                              1     v1     3     3       3  no: every slot is in use

    C overtakes B, which is allowed: C lies one place behind B, and W = 2. Had B and C finished first, with A still
    running, they could not have been a batch: C lies two places behind A.
    """

    refills: ClassVar[bool] = False
    finish_frees: ClassVar[bool] = False

    window: int
    """W, places of the queue"""

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
        bound = (self.max_staleness + 1) * self.groups_per_step - (self.window - 1)
        return min(bound, pipeline_slots(self.groups_per_step, self.max_staleness, self.pipeline_depth))

    def used(self, queue: SlotQueue, *, step: int, version: int, published: int) -> int:
        """Live groups, and those in batches whose weights the generator does not hold yet."""
        return queue.live + self.groups_per_step * max(0, step - version)

    def latest_step(self, *, ahead: int, step: int) -> int:
        """Latest step at which a group with `ahead` live groups before it is trained."""
        return step + (ahead + self.window - 1) // self.groups_per_step

    def admit(self, queue: SlotQueue, *, step: int, version: int, published: int) -> bool:
        return (
            self.used(queue, step=step, version=version, published=published) < self.slots
            and self.latest_step(ahead=queue.live, step=step) - version <= self.max_staleness
        )

    def reissue(self, queue: SlotQueue, group: int, *, step: int, version: int) -> bool:
        return self.latest_step(ahead=queue.ahead(group), step=step) - version <= self.max_staleness

    def select(self, queue: SlotQueue, *, step: int) -> list[int] | None:
        if queue.num_ready < self.groups_per_step:
            return None
        chosen: list[int] = []
        oldest_open: int | None = None  # place of the oldest group that is not finished
        for place, slot in enumerate(queue.entries):
            if slot.trained:
                continue
            if not slot.finished:
                if oldest_open is None:
                    oldest_open = place
                continue
            if oldest_open is not None and place - oldest_open >= self.window:
                return None
            chosen.append(slot.group)
            if len(chosen) == self.groups_per_step:
                return chosen
        return None

    def held_up_by(self, queue: SlotQueue, *, step: int) -> list[int]:
        """The oldest running group, where the window ends before P finished ones are found."""
        if queue.num_ready < self.groups_per_step or self.select(queue, step=step) is not None:
            return []
        return [next(slot.group for slot in queue.entries if not slot.finished and not slot.trained)]

    def overdue(self, queue: SlotQueue, *, step: int) -> list[int]:
        return []


# ---------------------------------------------------------------- wait and drop: every group has a deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinePolicy(Policy, ABC):
    """A group started by a generator that holds version v has tokens of version >= v, hence the deadline v + k:
    trained at a step <= v + k, none of its tokens is staler than k. `WaitPolicy` and `DropPolicy` differ in how the
    deadline is kept."""

    def used(self, queue: SlotQueue, *, step: int, version: int, published: int) -> int:
        """Live groups, and those in batches whose weights are not published yet."""
        return queue.live + self.groups_per_step * max(0, step - published)

    def reissue(self, queue: SlotQueue, group: int, *, step: int, version: int) -> bool:
        """Its deadline stays: the weights must be no older than those it was admitted with."""
        return version + self.max_staleness >= queue.slot(group).deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitPolicy(DeadlinePolicy):
    """Bounds staleness by letting the trainer wait for the groups that are due.

    Nothing is discarded and there is no window: a batch takes any finished groups, those with the earliest deadline
    first, as long as all others can still be trained in time; else the trainer waits for a due one.

    Let N(d) be the live groups with a deadline <= d while the batch of `step` is next. There are d - step + 1 batches
    of P groups up to step d, so all live groups can be trained in time only if

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

    Example: `WaitPolicy(groups_per_step=16, max_staleness=1, pipeline_depth=2.0)`.
    """

    refills: ClassVar[bool] = False
    finish_frees: ClassVar[bool] = True

    def admit(self, queue: SlotQueue, *, step: int, version: int, published: int) -> bool:
        if self.used(queue, step=step, version=version, published=published) >= self.slots:
            return False
        own = version + self.max_staleness
        return all(
            count + 1 <= self.groups_per_step * (deadline - step + 1)
            for deadline, count in queue.due_by(own)
            if deadline >= own
        )

    def select(self, queue: SlotQueue, *, step: int) -> list[int] | None:
        if queue.num_ready < self.groups_per_step:
            return None
        chosen = queue.earliest(self.groups_per_step)
        if self._missed(queue, chosen, step):
            return None
        return sorted(chosen)

    def held_up_by(self, queue: SlotQueue, *, step: int) -> list[int]:
        """The running groups that would be too late if P finished ones went without them."""
        if queue.num_ready < self.groups_per_step:
            return []
        return self._missed(queue, queue.earliest(self.groups_per_step), step)

    def overdue(self, queue: SlotQueue, *, step: int) -> list[int]:
        """None, unless a generator sent tokens older than the weights it said it held."""
        return [slot.group for slot in queue.entries if slot.finished and not slot.trained and slot.deadline < step]

    def _missed(self, queue: SlotQueue, chosen: list[int], step: int) -> list[int]:
        """Running groups that could not all be trained in time if `chosen` were the batch of `step`.

        Where (*) fails among finished groups alone, a generator has lied about its weights: waiting would not mend
        that, and what comes too late is refused."""
        taken = set(chosen)
        rest = sorted(
            (slot for slot in queue.entries if not slot.trained and slot.group not in taken),
            key=lambda slot: slot.deadline,
        )
        running: list[int] = []
        for place, slot in enumerate(rest, start=1):
            if not slot.finished:
                running.append(slot.group)
            last_of_deadline = place == len(rest) or rest[place].deadline > slot.deadline
            if last_of_deadline and running and place > self.groups_per_step * (slot.deadline - step):
                return running
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class DropPolicy(DeadlinePolicy):
    """Bounds staleness by discarding what came too late, and asks the same problems again.

    Generators run ahead within the slots, and no step waits for a slow group. A batch takes any P finished groups,
    those with the earliest deadline first. A group started by a generator that holds version v is overdue when the
    batch of step v + k has been formed without it: finished or still running, it is dropped, gives its slot up at
    once, and its problem is asked again. (When it is finished, the version of its oldest token counts instead of v.)
    So every batch has P groups, all of them within the bound, and every problem is trained.

    What is trained is then biased towards short episodes *under given weights*: long ones are dropped more often and
    come from later attempts. The buffer reports by how much.

    Example: `DropPolicy(groups_per_step=16, max_staleness=1, pipeline_depth=2.0)`.
    """

    refills: ClassVar[bool] = True
    finish_frees: ClassVar[bool] = False

    def admit(self, queue: SlotQueue, *, step: int, version: int, published: int) -> bool:
        """Whether a slot is free and the group would not be too old before it begins."""
        used = self.used(queue, step=step, version=version, published=published)
        return used < self.slots and version + self.max_staleness >= step

    def select(self, queue: SlotQueue, *, step: int) -> list[int] | None:
        if queue.num_ready < self.groups_per_step:
            return None
        chosen = queue.earliest(self.groups_per_step)
        return sorted(chosen) if len(chosen) == self.groups_per_step else None

    def held_up_by(self, queue: SlotQueue, *, step: int) -> list[int]:
        return []

    def overdue(self, queue: SlotQueue, *, step: int) -> list[int]:
        return [slot.group for slot in queue.entries if not slot.trained and slot.deadline < step]
