"""Problems whose code kills or freezes the generator that runs it (`Poison`): after `generator.max_deaths` of them the
problem is refused, with its place, and the run goes on without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
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
MOST_REASON = 600
"""characters kept of a cause"""


@dataclass(slots=True, kw_only=True)
class Poison:
    """Deaths by problem. Which problem's code ran when a process ended, its launcher reads from the process's mark
    (generator/step_mark.py)."""

    limit: int
    """deaths or freezes after which a problem is refused"""
    deaths: Counter[tuple[Split, int]] = field(default_factory=Counter)
    """by (split, problem)"""
    refused: dict[tuple[Split, int], str] = field(default_factory=dict)
    """(split, problem) -> why"""
    counted: set[tuple[str, int]] = field(default_factory=set)
    """(name, process number) of the generators whose end is counted: a message may come twice"""

    def add(self, gone: Gone, group: Group) -> bool:
        """Count an end. True when the problem is refused from now on."""
        if (gone.name, gone.pid) in self.counted:
            return False
        self.counted.add((gone.name, gone.pid))
        problem = (group.split, group.problem)
        self.deaths[problem] += 1
        if self.deaths[problem] < self.limit or problem in self.refused:
            return False
        place = f", in {gone.place}" if gone.place else ""
        self.refused[problem] = (
            f"{POISON}: problem {group.problem} of the {group.split} split ended its generator "
            f"{self.deaths[problem]} times{place}; the last time: {gone.reason[:MOST_REASON]}"
        )
        return True

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
        self.deaths = Counter({(split, problem): count for split, problem, count in remembered["deaths"]})
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
