"""Evaluations: held-out problems that generators sample between training groups (`Evaluations`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import nan

from async_rl.buffer.ledger import Group
from async_rl.trajectory.parts import part_means
from async_rl.trajectory.types import group_seed
from async_rl.wire.messages import Evaluate, EvaluationResult, Permit

REASONS = 3
"""different reasons of failed episodes that are told with the result"""
REMEMBERED = 8
"""evaluations whose result is in the store that can still be asked for"""


@dataclass(slots=True, kw_only=True)
class RunningEvaluation:
    """One evaluation on its way."""

    version: int
    """oldest weights that may be used"""
    groups: Sequence[Group]
    """one for each problem; not trained"""
    recorded: bool = False
    """its result is in the store"""


@dataclass(slots=True, kw_only=True)
class Evaluations:
    """The evaluations asked for (of the recorded ones the newest), and the groups that no generator has taken yet."""

    asked: dict[int, RunningEvaluation] = field(default_factory=dict)
    """by the trainer's number"""
    groups: dict[int, tuple[RunningEvaluation, Group]] = field(default_factory=dict)
    """by group number, of those not recorded yet"""
    queue: deque[int] = field(default_factory=deque)
    """group numbers without a generator, in order"""

    def add(self, number: int, evaluation: RunningEvaluation) -> None:
        """Queue the groups of a new evaluation."""
        self.asked[number] = evaluation
        for group in evaluation.groups:
            self.groups[group.group] = (evaluation, group)
            self.queue.append(group.group)

    @property
    def unfinished(self) -> int:
        """Evaluations whose result is not in the store."""
        return sum(not evaluation.recorded for evaluation in self.asked.values())

    def take(self, version: int) -> Group | None:
        """The next group for a generator that holds `version`, if those weights are new enough."""
        if not self.queue:
            return None
        evaluation, group = self.groups[self.queue[0]]
        if version < evaluation.version:
            return None
        self.queue.popleft()
        return group

    def group(self, number: int) -> Group | None:
        """The group of this number, if it is not recorded yet."""
        entry = self.groups.get(number)
        return entry[1] if entry is not None else None

    def requeue(self, peer: bytes) -> None:
        """A generator is gone: what it had not finished goes to others."""
        for number, (_, group) in self.groups.items():
            if group.holder == peer and not group.complete:
                group.holder = None
                self.queue.append(number)

    def complete(self, group: int) -> None:
        """The group needs no generator any more (what a lost one still sent may complete it)."""
        if group in self.queue:
            self.queue.remove(group)

    def record(self, evaluation: RunningEvaluation) -> None:
        """Its result is in the store."""
        evaluation.recorded = True
        for group in evaluation.groups:
            self.groups.pop(group.group, None)
        recorded = [number for number, one in self.asked.items() if one.recorded]
        for number in recorded[:-REMEMBERED]:
            del self.asked[number]


def evaluation_groups(ask: Evaluate, *, seed: int, new_number: Callable[[], int], now: float) -> list[Group]:
    """One group a problem. `seed`: of the run; `new_number`: gives a group number that was never used."""
    return [
        Group(
            permit=Permit(
                group=new_number(),
                problem=problem,
                split="eval",
                samples=tuple(range(ask.samples)),
                # not the training stream: every evaluation draws the same noise for the same problem
                seed=group_seed(seed ^ 0x5EED, place),
                temperature=ask.temperature,
            ),
            admitted_at=now,
            admitted_version=ask.version,
        )
        for place, problem in enumerate(ask.problems)
    ]


def evaluation_result(number: int, evaluation: RunningEvaluation) -> EvaluationResult:
    """What has arrived so far; a failed trajectory has no reward (NaN)."""
    samples = [s for g in evaluation.groups for s in g.samples.values()]
    versions = [s.version_min for s in samples if s.version_min >= 0]
    newest = [s.version_max for s in samples if s.version_max >= 0]
    return EvaluationResult(
        evaluation=number,
        finished=all(g.complete for g in evaluation.groups),
        rewards=tuple(nan if s.failed else s.reward for s in samples),
        failures=tuple(dict.fromkeys(s.reason for s in samples if s.failed))[:REASONS],
        parts=part_means(s.parts for s in samples if s.parts and not s.failed),
        version_min=min(versions, default=-1),
        version_max=max(newest, default=-1),
        missing=sum(len(g.missing) for g in evaluation.groups),
    )
