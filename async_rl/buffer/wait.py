"""Wait: bound staleness by letting the trainer wait for whoever is due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from async_rl.buffer.deadline import ByDeadline
from async_rl.buffer.staleness import Line, earliest


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait(ByDeadline):
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
