"""Which trajectories are verified (`Sampling`), and which generators are not believed any more (`Quarantine`).

The trainer finds out whether a trajectory is what it says; here is only chosen, without the generators knowing which.
A generator has lives: each Hello with a session of its own begins one. What is proven concerns a life, and the groups
of every life under its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from async_rl.trajectory import Trajectory

KEY = "quarantine"
"""under which the store keeps the names that stay out"""
FABRICATED = "fabricated"
"""first word of the reason of a group that is refused for its generator's lie"""
NEW = 8
"""a generator that has sent n training trajectories has about NEW / n of the next ones verified, until that is less
than the share"""
MOST_GROUPS = 20
"""one trajectory in so many groups is verified at least: two of these stretches are less than 50 groups"""
SUSPECT = 64
"""trajectories verified after one that is not what it says, of all that its generator sends"""
LIVES = 2
"""proven lies of a generator of the launcher's after which it is not started again. A fault of its memory dies with the
process; one of the code or the machine comes again, and is found again"""
IMPOSSIBLE = 3
"""messages with impossible versions or tokens in one life that prove a lie: a sound generator ends at the first"""

Life = tuple[str, int]
"""(name, session)"""


@dataclass(slots=True, kw_only=True)
class Sampling:
    """Chooses the trajectories that are verified: one of each stretch of `1 / share`, at a place that only this process
    knows; shorter stretches while a generator is new."""

    share: float
    """of the trajectories; 0: none"""
    group_size: int
    secret: bytes
    """never used before, so that nobody can tell what will be verified"""
    stretches: dict[tuple[Life, str], tuple[int, int, int]] = field(default_factory=dict)
    """(life, split) -> trajectories seen, number of the one chosen in the present stretch, end of that"""
    suspects: dict[Life, int] = field(default_factory=dict)
    """generators under suspicion, and how many of their next trajectories are all verified"""

    def can_verify(self, trajectory: Trajectory) -> bool:
        """Whether there is something to verify."""
        return self.share > 0 and not trajectory.failed and trajectory.num_policy_tokens > 0

    def choose(self, life: Life, trajectory: Trajectory) -> bool:
        """Whether this trajectory of that generator is to be verified."""
        if not self.can_verify(trajectory):
            return False
        key = (life, trajectory.split)
        seen, chosen, end = self.stretches.get(key, (0, 0, 0))
        if seen >= end:
            length = self.stretch(seen) if trajectory.split == "train" else self.longest
            told = repr((key, seen, length)).encode()
            drawn = int.from_bytes(blake2b(told, key=self.secret, digest_size=8).digest(), "little")
            chosen, end = seen + drawn % length, seen + length
        self.stretches[key] = (seen + 1, chosen, end)
        left = self.suspects.get(life, 0)
        if left:
            self.suspects[life] = left - 1
        return seen == chosen or left > 0

    @property
    def longest(self) -> int:
        """Trajectories of the longest stretch."""
        return max(1, min(round(1 / self.share), MOST_GROUPS * self.group_size))

    def stretch(self, seen: int) -> int:
        """Trajectories of the stretch that begins behind so many of a generator."""
        return max(1, min(self.longest, seen // NEW))

    def suspect(self, life: Life) -> None:
        """Verify all that this generator sends next."""
        self.suspects[life] = SUSPECT

    def forget(self, life: Life) -> None:
        """This life is over."""
        self.suspects.pop(life, None)
        for split in ("train", "eval"):
            self.stretches.pop((life, split), None)


@dataclass(slots=True)
class Touched:
    """What was trained of one generator's trajectories."""

    groups: int = 0
    first_step: int = -1
    last_step: int = -1

    def add(self, step: int) -> None:
        self.groups += 1
        self.first_step = step if self.first_step < 0 else self.first_step
        self.last_step = step


@dataclass(slots=True, kw_only=True)
class Quarantine:
    """The generators that were proven to lie."""

    lives: dict[Life, str] = field(default_factory=dict)
    """life -> why"""
    processes: dict[tuple[str, int], str] = field(default_factory=dict)
    """(name, process number) -> why: a process that says Hello again is the same one"""
    names: dict[str, str] = field(default_factory=dict)
    """names that stay out, also over a resume -> why"""
    times: dict[str, int] = field(default_factory=dict)
    """proven lies in this launch by name"""
    touched: dict[str, Touched] = field(default_factory=dict)
    """by name, of all generators"""
    impossible: dict[Life, int] = field(default_factory=dict)
    """messages with impossible trajectories"""

    def add(self, life: Life, pid: int, reason: str) -> None:
        """This life lied, of process `pid`. A name of the launcher's may come back with a new process once; any other
        name stays out."""
        name = life[0]
        self.lives[life] = self.processes[name, pid] = reason
        self.times[name] = self.times.get(name, 0) + 1
        if not of_the_launcher(name) or self.times[name] >= LIVES:
            self.names[name] = reason

    @property
    def known(self) -> bool:
        """Whether anybody was proven to lie: the unusual case, and until then no message is looked at for it."""
        return bool(self.lives or self.names)

    def reason(self, life: Life) -> str:
        """Why nothing is taken from this life; empty: it is."""
        return self.names.get(life[0], "") or self.lives.get(life, "")

    def keeps_out(self, name: str, pid: int) -> str:
        """Why this process may not say Hello; empty: it may."""
        return self.names.get(name, "") or self.processes.get((name, pid), "")

    def count_impossible(self, life: Life) -> bool:
        """One more message with an impossible trajectory; True when that proves a lie."""
        self.impossible[life] = self.impossible.get(life, 0) + 1
        return self.impossible[life] == IMPOSSIBLE

    def trained(self, name: str, step: int) -> None:
        """A group with trajectories of it is in the batch of `step`."""
        self.touched.setdefault(name, Touched()).add(step)

    def remembered(self) -> dict[str, object]:
        """As the store keeps it: those of others. The launcher's own are new processes in the next launch."""
        return {"names": {name: why for name, why in self.names.items() if not of_the_launcher(name)}}

    def restore(self, remembered: Mapping[str, Any]) -> None:
        """Go on where an earlier launch of the run stood."""
        self.names = dict(remembered["names"])


def of_the_launcher(name: str) -> bool:
    """Whether the launcher starts the generator of this name; others may not take such a name (acceptance.py)."""
    return re.fullmatch(r"generator-\d+", name) is not None
