"""Problems whose code kills or freezes the generator that runs it (`Poison`): after `generator.max_deaths` of them the
problem is refused, with its place, and the run goes on without it.

Whose code it was is read from what the process left: by the launcher for its own generators, by a small process beside
it for one that joined (run/keeper.py). Where a joined generator falls silent with all of its host, only its last pulse
tells. Of a process that ran code of several problems in threads, each may have been it: each counts for its share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from async_rl.buffer.ledger import Group
from async_rl.trajectory import Split, Trajectory
from async_rl.trajectory.types import sample_seed
from async_rl.wire.messages import Gone

KEY = "poison"
"""under which the store keeps deaths and refusals"""
POISON = "poison"
"""first word of the reason of such a refusal"""
ROUNDING = 1e-6
"""of a sum of shares"""
MOST_REASON = 600
"""characters kept of a cause"""


@dataclass(slots=True, kw_only=True)
class Poison:
    """Deaths by problem."""

    limit: int
    """deaths or freezes after which a problem is refused"""
    deaths: dict[tuple[Split, int], float] = field(default_factory=lambda: defaultdict(float))
    """by (split, problem); a share of one where it was one of several"""
    refused: dict[tuple[Split, int], str] = field(default_factory=dict)
    """(split, problem) -> why"""
    counted: set[tuple[str, int]] = field(default_factory=set)
    """(name, process number) of the generators whose end is counted: a message may come twice"""
    silent: dict[tuple[str, int], tuple[Split, int]] = field(default_factory=dict)
    """of these, those that only fell silent, and their problem: one that comes back has not died"""

    def add(self, gone: Gone, groups: Sequence[Group], *, silent: bool = False) -> list[tuple[Split, int]]:
        """Count an end, which the code of one of the groups was. The problems that are refused from now on."""
        life = (gone.name, gone.pid)
        problems = list(dict.fromkeys((group.split, group.problem) for group in groups))
        if life in self.counted or not problems:
            return []
        self.counted.add(life)
        if silent:
            self.silent[life] = problems[0]
        return [problem for problem in problems if self._count(problem, 1 / len(problems), gone)]

    def _count(self, problem: tuple[Split, int], share: float, gone: Gone) -> bool:
        self.deaths[problem] += share
        if self.deaths[problem] < self.limit - ROUNDING or problem in self.refused:
            return False
        split, number = problem
        place = f", in {gone.place}" if gone.place else ""
        self.refused[problem] = (
            f"{POISON}: problem {number} of the {split} split ended its generator "
            f"{self.deaths[problem]:.3g} times{place}; the last time: {gone.reason[:MOST_REASON]}"
        )
        return True

    def came_back(self, name: str, pid: int) -> None:
        """A process that had fallen silent has not died, or more is known of its end."""
        problem = self.silent.pop((name, pid), None)
        if problem is not None:
            self.deaths[problem] -= 1
            self.counted.discard((name, pid))

    def reason(self, group: Group) -> str:
        """Why the problem of this group is not asked any more; empty: it is."""
        return self.refused.get((group.split, group.problem), "")

    def remembered(self) -> dict[str, object]:
        """As the store keeps it for a restarted buffer."""
        return {
            "deaths": [[split, problem, count] for (split, problem), count in self.deaths.items()],
            "refused": [[split, problem, why] for (split, problem), why in self.refused.items()],
        }

    def restore(self, remembered: Mapping[str, Any]) -> None:
        """Go on where an earlier launch of the run stood."""
        self.deaths = defaultdict(float, {(split, number): count for split, number, count in remembered["deaths"]})
        self.refused = {(split, problem): why for split, problem, why in remembered["refused"]}


def failed_trajectories(group: Group, reason: str, now: float) -> list[Trajectory]:
    """One without a token for each missing sample of a held-out problem that is refused."""
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return [
        Trajectory(
            group=group.group,
            sample=sample,
            problem=group.problem,
            split=group.split,
            seed=sample_seed(group.permit.seed, sample),
            tokens=nothing[0],
            log_behaviour=nothing[1],
            turns=(),
            versions=(),
            reward=0.0,
            ended="error",
            temperature=group.permit.temperature,
            reason=reason,
            started_at=now,
            finished_at=now,
        )
        for sample in group.missing
    ]
