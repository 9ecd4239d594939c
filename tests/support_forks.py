"""Simulated generators that play a rollout plan and note what a teacher says, by the functions that real ones use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from msgspec.structs import replace
from support_sampler import rules_of
from support_world import Invariants, some_world

from async_rl.config.rollout import RolloutSettings, forks_of, parent_of
from async_rl.config.teachers import NOTE
from async_rl.generator.forks import place_of, start_at, with_fork
from async_rl.instruments.world.decoding import SimulatedEpisode, TurnByTurn
from async_rl.instruments.world.generator import Pair
from async_rl.instruments.world.world import World
from async_rl.trainer.plans import forks_among
from async_rl.trajectory import Trajectory
from async_rl.trajectory.forks import fork_in
from async_rl.trajectory.given import GIVEN, Given, given_in
from async_rl.wire import messages as msg

TEACHER = f"{NOTE}big"


@dataclass(slots=True)
class ForkedEpisode(SimulatedEpisode):
    """Its tokens are those that it was given and then some that depend on the process that samples them."""

    life: int = 0
    begun: list[int] = field(default_factory=list)
    """tokens that a lost generator had done"""

    @property
    def given(self) -> tuple[tuple[int, int], ...]:
        return self.permit.start.turns if self.permit.start is not None else ()

    def trajectory(self, **end: Any) -> Trajectory:
        made = SimulatedEpisode.trajectory(self, **end)
        tokens = (np.arange(len(made.tokens)) * 7 + 13 * self.life + self.sample).astype(np.int32) % 90
        tokens[0] = 0
        if (start := self.permit.start) is not None:
            given = np.frombuffer(start.tokens, "<i4")
            tokens[: len(given)] = given
        if self.begun:
            tokens[: len(self.begun)] = self.begun
        return replace(made, tokens=tokens)


def said_of(trajectory: Trajectory, turn: int) -> float:
    """What the teacher says of the token of a turn: a function of the tokens before it."""
    before = trajectory.tokens[: trajectory.turns[turn].start + 1]
    return -float(np.dot(before, np.arange(1, len(before) + 1)) % 97) / 8


def taught(trajectory: Trajectory) -> Trajectory:
    """With the teacher's notes on its tokens."""
    turns = tuple(
        replace(turn, token_notes=((TEACHER, (said_of(trajectory, i),)),)) for i, turn in enumerate(trajectory.turns)
    )
    return replace(trajectory, turns=turns)


@dataclass(slots=True, eq=False, kw_only=True)
class Forking(TurnByTurn):
    """As generator/forks.py: a fork waits for its parent, where that is played here."""

    plan: RolloutSettings = field(default_factory=RolloutSettings)
    here: dict[Pair, Trajectory | None] = field(default_factory=dict)
    """finished; None: failed"""
    waiting: dict[Pair, tuple[msg.Permit, Trajectory | None]] = field(default_factory=dict)

    @property
    def running(self) -> Collection[Pair]:
        return {*self.episodes, *self.waiting}

    @property
    def occupied(self) -> int:
        return len(self.episodes) + len(self.waiting)

    def start(self, permit: msg.Permit, sample: int, record: Trajectory | None) -> None:
        found = parent_of(sample, self.plan) if permit.split == "train" else None
        if found is not None and (permit.group, found[0]) in self.running:
            self.waiting[permit.group, sample] = permit, record
        else:
            self._play(permit, sample, record)

    def _play(self, permit: msg.Permit, sample: int, record: Trajectory | None) -> None:
        found = parent_of(sample, self.plan) if permit.split == "train" else None
        parent = None if found is None else self.here.get((permit.group, found[0]))
        if found is not None and parent is not None:
            at = place_of(parent, found[1], forks_of(found[0], permit.size or 4, self.plan), self.plan)
            start = None if at is None else start_at(parent, at)
            permit = permit if start is None else replace(permit, start=start)
        if record is not None:  # turns that went another way are sampled anew
            before, now = given_in(record) or Given(), Given(stretches=permit.start.turns if permit.start else ())
            same = (
                permit.start is None or record.tokens[: len(permit.start.tokens) // 4].tobytes() == permit.start.tokens
            )
            record = record if before.stretches == now.stretches and same else None
        random = self.generator.clock.random
        pause_s = self.turn_s * self.spread ** random.random()
        episode = ForkedEpisode(
            permit, sample, num_turns=random.randint(1, 3), pause_s=pause_s, life=self.generator.pid,
        )  # fmt: skip
        if record is not None:
            episode.versions = [span.version for span in record.versions]
            episode.begun = record.tokens.tolist()
            episode.num_turns = max(episode.num_turns, len(episode.versions))
        self.episodes[permit.group, sample] = episode
        self._go_on(episode)

    def abandon(self, groups: Collection[int]) -> None:
        for pair in [pair for pair in self.waiting if pair[0] in groups]:
            permit, _ = self.waiting.pop(pair)
            self.generator.ended(
                ForkedEpisode(permit, pair[1], num_turns=1, pause_s=1.0, life=self.generator.pid).trajectory(
                    ended="aborted", reason=msg.ABANDONED
                )
            )
        TurnByTurn.abandon(self, groups)

    def clear(self) -> None:
        TurnByTurn.clear(self)
        self.waiting.clear()
        self.here.clear()

    def _end(self, pair: Pair, **end: Any) -> None:
        made = self.episodes.pop(pair).trajectory(**end)
        if made.split == "train" and not made.failed:
            found = parent_of(pair[1], self.plan)
            parent = None if found is None else self.here.get((pair[0], found[0]))
            made = taught(made if parent is None else with_fork(made, parent))
        self.here[pair] = None if made.failed else made
        self.generator.ended(made)
        for child in [child for child in self.waiting if child[0] == pair[0]]:
            found = parent_of(child[1], self.plan)
            if found is not None and found[0] == pair[1]:
                permit, record = self.waiting.pop(child)
                self._play(permit, child[1], record)


@dataclass(eq=False, kw_only=True)
class ForkedInvariants(Invariants):
    """And what must be so of forks and of what teachers said."""

    met: Counter[str] = field(default_factory=Counter)

    def trained(self, step: int, batch: msg.Batch) -> None:
        Invariants.trained(self, step, batch)
        ordered = sorted(batch.trajectories, key=lambda t: (t.group, t.sample))
        forks = forks_among(ordered, "cpu")
        for number, trajectory in enumerate(ordered):
            if trajectory.failed:
                continue
            for i, turn in enumerate(trajectory.turns):
                assert turn.token_notes == ((TEACHER, (said_of(trajectory, i),)),), "what a teacher said goes along"
                self.met["taught"] += 1
            fork = fork_in(trajectory)
            if (fork is None) != (not (given := given_in(trajectory) or Given()).stretches):
                raise AssertionError("a fork says where it left its parent")
            parent = -1 if forks is None else int(forks[number, 0])
            self.met["forks"] += parent >= 0
            self.met["parent sampled anew"] += fork is not None and parent < 0
            if parent >= 0:
                before = ordered[parent]
                end = sum(given.stretches[-1])
                assert before.group == trajectory.group
                assert before.tokens[:end].tolist() == trajectory.tokens[:end].tolist()
                assert int(forks[number, 1]) == sum(turn.start < end for turn in before.turns)  # type: ignore[index]
            assert (GIVEN in trajectory.info) == (fork is not None)


def forked_world(seed: int, *, store: Any = None, **more: Any) -> World:
    """A schedule of faults with a rollout plan drawn at random, watched."""
    random = Random(~seed)
    plan = RolloutSettings(
        roots=random.randint(1, 2),
        shape=random.choice(("chain", "tree")),
        fork=random.choice(("uncertain_turn", "improbable_token", "even")),
    )
    watch = ForkedInvariants(policy=rules_of(seed).policy)
    return some_world(
        seed, store=store, rollout=plan, watch=watch, decoder=lambda **values: Forking(plan=plan, **values), **more
    )
