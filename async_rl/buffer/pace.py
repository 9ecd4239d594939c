"""Pace: bound staleness by holding generation back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from async_rl.buffer.staleness import Line, pipeline_slots, too_stale
from async_rl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
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
