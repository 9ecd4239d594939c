"""The staleness rule as one pure object: who may start, what may be trained, what must be refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor

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
    staleness at its training step <= k, for any speeds and any order of arrival.

    Written as slots: `live + P * (step - v)` slots are in use (a group keeps its slot until the
    generator holds weights that were trained on it), out of `(k + 1) * P - (W - 1)`; the window's
    `ceil((W - 1) / P)` steps are thus taken off the admission bound.

    Example: `Pace(groups_per_step=16, max_staleness=1, pipeline_depth=2.0, window=1)`.
    """

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
        if p < 1:
            raise UserError(f"batch.groups_per_step is {p}; it must be at least 1")
        if k < 0:
            raise UserError(f"staleness.max_staleness is {k}; it must be at least 0")
        if not 1 <= self.pipeline_depth <= k + 1:
            raise UserError(
                f"staleness.pipeline_depth is {self.pipeline_depth:g}; it must lie between 1 (one batch at a time) "
                f"and max_staleness + 1 = {k + 1}"
            )
        if not 1 <= self.window <= k * p + 1:
            raise UserError(
                f"staleness.window is {self.window} groups; with max_staleness {k} and {p} groups a step it must "
                f"lie between 1 and {k * p + 1}, else a batch could never fill"
            )

    @property
    def slots(self) -> int:
        """Most groups that may hold a slot at once."""
        bound = (self.max_staleness + 1) * self.groups_per_step - (self.window - 1)
        return min(bound, floor(self.pipeline_depth * self.groups_per_step))

    def used(self, *, live: int, step: int, version: int) -> int:
        """Slots in use as seen by a generator that holds `version`."""
        return live + self.groups_per_step * max(0, step - version)

    def latest_step(self, *, ahead: int, step: int) -> int:
        """Latest step at which a group with `ahead` untrained groups before it is trained."""
        return step + (ahead + self.window - 1) // self.groups_per_step

    def admit(self, *, live: int, step: int, version: int) -> bool:
        """May a generator holding `version` start one more group?"""
        return (
            self.used(live=live, step=step, version=version) < self.slots
            and self.latest_step(ahead=live, step=step) - version <= self.max_staleness
        )

    def reissue(self, *, ahead: int, step: int, version: int) -> bool:
        """May a generator holding `version` take over an admitted group at its old place?"""
        return self.latest_step(ahead=ahead, step=step) - version <= self.max_staleness

    def select(self, order: Sequence[Entry]) -> list[int] | None:
        """The groups of the next batch in order of admission, or None while it cannot be filled.

        `order`: every group not refused, in order of admission, from the oldest untrained one on.
        """
        chosen: list[int] = []
        oldest_open: int | None = None  # place of the oldest group that is not finished
        for place, entry in enumerate(order):
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

    def refuse(self, *, version_min: int, step: int) -> str | None:
        """Why a finished trajectory may not be trained at `step`, or None. Checked when a batch is
        formed, on what arrived, whatever admission believed."""
        if version_min >= 0 and step - version_min > self.max_staleness:
            return f"stale: version {version_min} at step {step} exceeds max_staleness {self.max_staleness}"
        return None


@dataclass(slots=True, kw_only=True)
class Entry:
    """A group in order of admission, as far as selection is concerned."""

    group: int
    finished: bool = False
    trained: bool = False


def forget_trained(order: list[Entry]) -> None:
    """Drop the trained groups before the oldest untrained one."""
    keep = next((i for i, entry in enumerate(order) if not entry.trained), len(order))
    del order[:keep]


def zero_signal(rewards: Iterable[float]) -> bool:
    """All rewards of a group are equal: its group-relative advantages are zero."""
    values = list(rewards)
    return len(values) > 1 and max(values) == min(values)
