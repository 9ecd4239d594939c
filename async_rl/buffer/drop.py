"""Drop: bound staleness by discarding what came too late, and asking the same problems again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from async_rl.buffer.deadline import ByDeadline
from async_rl.buffer.staleness import Line, earliest


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop(ByDeadline):
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
