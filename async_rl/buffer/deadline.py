"""What the policies share that give every group a deadline: the slots, and what may take a group's place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from async_rl.buffer.staleness import Line, pipeline_slots, too_stale


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
