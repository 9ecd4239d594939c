"""The experience pool: which stored trajectories may come back, and which do at a step (`Pool`).

Pure: no I/O, no clock. What is in it follows from the batches formed so far, in their order, and what a step gets is a
function of (seed, step, contents, the fresh groups of the batch). So a buffer that was killed decides the same again:
it adds the stored batches one after the other (restore.py), and takes the rows that were stored as they are.

The order at a step: `expire`, `draw`, `use`, `add`. A group of the batch may come back from the next step on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import nsmallest
from itertools import islice
from operator import neg, truediv
from random import Random
from statistics import median
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from async_rl.buffer.ledger import Group, SampleRecord
from async_rl.config.pool import PoolSettings
from async_rl.trajectory.reuse import POOL_GROUPS, Drawn, Reuse, Source

KEY = "pool/forgotten"
"""key, among the store's meta, of the generators whose trajectories left the pool"""
HISTORY = 10240
"""groups whose mean and std are remembered (SPEAR)"""
STD_EPSILON = 1e-6
Name = tuple[int, int]
"""(group, sample); of a demonstration (0, number)"""


class Member(Struct, frozen=True, kw_only=True, gc=False):
    """A trajectory that may come back. Its tokens are in the store."""

    group: int
    sample: int
    problem: int
    """-1: of no training problem (a demonstration that names none)"""
    reward: float
    oldest: int
    """version of its oldest token (groups: of the oldest one of its group); -1: no weights sampled it"""
    advantage: float = 0.0
    """(reward - mean) / std in its group"""
    generator: str = ""
    """that sent it"""
    uses: int = 0

    @property
    def name(self) -> Name:
        return self.group, self.sample


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshGroup:
    """A fresh group of a batch, as far as the pool is concerned."""

    group: int
    problem: int
    size: int
    """samples asked for"""
    samples: Mapping[int, SampleRecord]
    """those that did not fail, by their index"""

    @staticmethod
    def of(group: Group) -> FreshGroup:
        usable = {number: sample for number, sample in sorted(group.samples.items()) if not sample.failed}
        return FreshGroup(group=group.group, problem=group.problem, size=group.size, samples=usable)

    @property
    def rewards(self) -> list[float]:
        return [sample.reward for sample in self.samples.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The step of which something is drawn, and its chance."""

    step: int
    random: Random
    baseline: float
    scale: float
    """see `Reuse`"""

    def row(self, member: Member, source: Source, *, as_group: int, as_sample: int) -> Reuse:
        return Reuse(
            source=source,
            group=member.group,
            sample=member.sample,
            as_group=as_group,
            as_sample=as_sample,
            uses=member.uses + 1,
            age=self.step - member.oldest if member.oldest >= 0 else 0,
            advantage=member.advantage,
            baseline=self.baseline,
            scale=self.scale,
        )


@dataclass(slots=True, kw_only=True)
class Pool:
    """What is kept, oldest first, and how often each came back."""

    settings: PoolSettings
    seed: int
    members: dict[Name, Member] = field(default_factory=dict)
    by_problem: dict[int, list[Name]] = field(default_factory=dict)
    """of the members, oldest first"""
    history: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    """(mean, std) of the rewards of the newest groups"""
    forgotten: list[tuple[str, int]] = field(default_factory=list)
    """(generator, step): what it had sent before that step left the pool"""

    @property
    def on(self) -> bool:
        return self.settings.source != "none"

    def know(self, demonstrations: Iterable[Member]) -> None:
        """The demonstrations there are, none of which came back yet."""
        if self.settings.source == "demonstrations":
            for member in demonstrations:
                self._insert(member)

    # ------------------------------------------------------------------ the steps

    def expire(self, step: int) -> None:
        """Remove what may not come back at `step` or later: too old, used up, or of a generator that lied."""
        chosen, members = self.settings, self.members.values()
        liars = {name for name, since in self.forgotten if since == step}
        gone = [member for member in members if member.generator in liars] if liars else []
        if (first := step - chosen.max_age) > 0 and chosen.max_age:
            gone += [member for member in members if 0 <= member.oldest < first]
        if chosen.max_uses:
            gone += [member for member in members if member.uses >= chosen.max_uses]
        for name in {member.name for member in gone}:
            self._remove(name)

    def draw(self, step: int, groups: Sequence[FreshGroup]) -> Drawn:
        """What comes back in the batch of `step`, whose fresh groups these are. Changes nothing."""
        chosen = self.settings
        if not self.members or (chosen.until and step >= chosen.until):
            return Drawn()
        moment = Moment(
            step=step,
            random=Random(_number(f"{self.seed}:pool:{step}")),
            baseline=median([mean for mean, _ in self.history]) if self.history else 0.0,
            scale=(median([std for _, std in self.history]) if self.history else 0.0) or 1.0,
        )
        return self._extra(moment, groups) if chosen.place == "extra" else self._answers(moment, groups)

    def use(self, rows: Iterable[Reuse]) -> None:
        """These have come back once more."""
        for row in rows:
            name = row.group, row.sample
            member = self.members[name]
            self.members[name] = replace(member, uses=member.uses + 1)

    def add(self, groups: Iterable[FreshGroup]) -> None:
        """These are in a batch now, and may come back in later ones."""
        for group in groups:
            if not (rewards := group.rewards):
                continue
            mean, std = mean_and_std(rewards)
            self.history.append((mean, std))
            if self.settings.source != "demonstrations":
                self._take(group, mean, std)

    def forget(self, generator: str, step: int) -> dict[str, object]:
        """A generator lied: what it sent and was in batches before `step`, the next one, does not come back. Returns
        what the store is to remember under KEY."""
        self.forgotten.append((generator, step))
        return self.remembered()

    def remembered(self) -> dict[str, object]:
        return {"forgotten": [list(pair) for pair in self.forgotten]}

    def restore(self, remembered: Mapping[str, Sequence[Sequence[object]]]) -> None:
        self.forgotten = [(str(name), int(str(step))) for name, step in remembered["forgotten"]]

    # ------------------------------------------------------------------ what is kept

    def _take(self, group: FreshGroup, mean: float, std: float) -> None:
        chosen = self.settings
        sampled = [(number, s) for number, s in group.samples.items() if s.version_min >= 0 and s.policy_length]
        if chosen.source == "groups" and (std == 0 < group.size - 1 or len(sampled) < group.size):
            return  # nothing to compare, or not whole
        whole = chosen.source == "groups"
        oldest = min([sample.version_min for _, sample in sampled], default=-1)
        found = []
        for number, sample in sampled:
            member = Member(
                group=group.group,
                sample=number,
                problem=group.problem,
                reward=sample.reward,
                oldest=oldest if whole else sample.version_min,
                advantage=(sample.reward - mean) / (std + STD_EPSILON) if std > 0 else 0.0,
                generator=sample.generator,
            )
            if whole or self._worth(member) > chosen.above:
                found.append(member)
        if chosen.source in ("successes", "priority"):  # of these the newest stay, so that others need not enter
            found = found[-chosen.per_problem :]
        for member in found:
            self._insert(member)
        self._shrink()

    def _worth(self, member: Member) -> float:
        """What `pool.above` is compared with."""
        if self.settings.source == "priority":
            match self.settings.priority:
                case "signal":
                    return abs(member.advantage)
                case "advantage":
                    return member.advantage
                case "recency":
                    return math.inf
                case "reward":
                    pass
        return member.reward

    def _insert(self, member: Member) -> None:
        name = member.name
        self.members[name] = member
        alike = self.by_problem.setdefault(member.problem, [])
        alike.append(name)
        if self.settings.source not in ("groups", "demonstrations") and len(alike) > self.settings.per_problem:
            best = self.settings.source == "best"
            self._remove(min(alike, key=lambda name: self.members[name].reward) if best else alike[0])

    def _shrink(self) -> None:
        """Down to `pool.size`, oldest first; whole groups leave together."""
        excess = len(self.members) - self.settings.size
        if excess <= 0:
            return
        whole = self.settings.source == "groups"
        leaving: list[Name] = []
        for name in self.members:
            if len(leaving) >= excess and not (whole and name[0] == leaving[-1][0]):
                break
            leaving.append(name)
        for name in leaving:
            self._remove(name)

    def _remove(self, name: Name) -> None:
        problem = self.members.pop(name).problem
        alike = self.by_problem[problem]
        alike.remove(name)
        if not alike:
            del self.by_problem[problem]

    # ------------------------------------------------------------------ what comes back

    def _extra(self, moment: Moment, groups: Sequence[FreshGroup]) -> Drawn:
        chosen = self.settings
        if chosen.flush_at:
            found = list(self.members.values()) if len(self.members) >= chosen.flush_at else []
        elif chosen.source == "groups":
            found = self._whole_groups(share_of(chosen.share, len(groups)) if chosen.share else chosen.rows, moment)
        else:
            fresh = sum(len(group.samples) for group in groups)
            wanted = share_of(chosen.share, fresh) if chosen.share else chosen.rows
            found = self._first(wanted, self.members, moment)
        row, source = moment.row, self._source
        if source == "groups":
            rows = [row(m, source, as_group=POOL_GROUPS + m.group, as_sample=m.sample) for m in found]
        else:
            rows = [row(m, source, as_group=POOL_GROUPS + place, as_sample=0) for place, m in enumerate(found)]
        return Drawn(rows=tuple(rows))

    def _whole_groups(self, wanted: int, moment: Moment) -> list[Member]:
        """All members of so many groups, those that came back least often first, else at random."""
        of_group: dict[int, list[Member]] = {}
        for member in self.members.values():
            of_group.setdefault(member.group, []).append(member)
        order = sorted((of_group[group][0].uses, moment.random.random(), group) for group in sorted(of_group))
        return [member for _, _, group in order[:wanted] for member in of_group[group]]

    def _answers(self, moment: Moment, groups: Sequence[FreshGroup]) -> Drawn:
        """Rows for the fresh groups that ask for some, one group after the other; nobody comes back twice at a step."""
        chosen = self.settings
        rows: list[Reuse] = []
        out: list[Name] = []
        taken: set[Name] = set()
        apart = chosen.place == "instead" and chosen.source == "priority"
        asking = [group for group in groups if self._asks(group)]
        wanted = len(asking) * chosen.rows
        order = iter(self._first(wanted, self.members, moment) if apart and asking else ())
        for group in asking:
            if apart:  # one group after the other takes from the same draw
                found = list(islice(order, chosen.rows))
            else:
                free = [name for name in self.by_problem.get(group.problem, ()) if name not in taken]
                found = self._first(chosen.rows, free, moment)
                taken.update(member.name for member in found)
            for number, member in enumerate(found):
                own, sample = (POOL_GROUPS + len(rows), 0) if apart else (group.group, group.size + number)
                rows.append(moment.row(member, self._source, as_group=own, as_sample=sample))
            places = sorted(group.samples)
            if found and chosen.place != "join":
                kept = 0 if chosen.place == "instead" else len(places) - len(found)
                out += [(group.group, sample) for sample in places[max(kept, 0) :]]
        return Drawn(rows=tuple(rows), out=tuple(out))

    @property
    def _source(self) -> Source:
        assert self.settings.source != "none"
        return self.settings.source

    def _asks(self, group: FreshGroup) -> bool:
        """Whether a fresh group gets rows of the pool."""
        if self.settings.when == "always":
            return True
        rewards = group.rewards
        if not rewards or (self.settings.when == "no_signal" and max(rewards) > min(rewards)):
            return False
        return mean_and_std(rewards)[0] <= self.settings.gate

    def _first(self, wanted: int, candidates: Iterable[Name], moment: Moment) -> list[Member]:
        """So many of the candidates, in the order in which they come back. Each may get a random number, in the order
        of their names."""
        members = [self.members[name] for name in sorted(candidates)]
        random = moment.random.random
        keys: Sequence[Any]  # numbers, or pairs of them
        match self.settings.source:
            case "demonstrations":
                keys = [(member.uses, random()) for member in members]
            case "best":
                keys = [(-member.reward, -member.group) for member in members]
            case "priority":  # without replacement, in proportion to the weight: Efraimidis and Spirakis, 2006
                chances = map(math.log, [random() or 1e-300 for _ in members])
                keys = list(map(truediv, map(neg, chances), self._weights(members, moment.step)))
            case _:
                keys = [random() for _ in members]
        return [members[place] for place in nsmallest(wanted, range(len(keys)), key=keys.__getitem__)]

    def _weights(self, members: Sequence[Member], step: int) -> list[float]:
        """How likely each comes back, against the others; above `pool.above`, and so above 0."""
        match self.settings.priority:
            case "recency":
                return [1.0 / (1 + step - member.oldest) for member in members]
            case "signal":
                return [abs(member.advantage) for member in members]
            case "advantage":
                return [member.advantage for member in members]
            case "reward":
                return [member.reward for member in members]


def share_of(share: float, fresh: int) -> int:
    """How many of the pool beside so many fresh ones make this share of all."""
    return math.floor(share / (1 - share) * fresh + 1e-9)


def _number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def mean_and_std(rewards: Sequence[float]) -> tuple[float, float]:
    """Of rewards, at least one: their mean and their standard deviation, 0 of a single one."""
    mean = math.fsum(rewards) / len(rewards)
    square = math.fsum((reward - mean) ** 2 for reward in rewards)
    return mean, math.sqrt(square / (len(rewards) - 1)) if len(rewards) > 1 else 0.0
