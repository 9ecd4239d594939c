"""Answers that go on from within others of their group (settings.rollout): where, and what they are given.

A fork is an episode with a start (start.py), like one that the permit gives: the turns of its parent before the fork
answer the first calls of `generate`, so the environment goes the same way, and their tokens are context without loss.
Its seed is that of its own sample, so it draws other numbers than its parent. A fork whose parent is not here (another
generator delivered it), failed, or offers no place begins with the prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from async_rl.config.rollout import RolloutSettings, forks_of, parent_of
from async_rl.generator.session import Ticket
from async_rl.trajectory import Trajectory
from async_rl.trajectory.forks import FORK
from async_rl.trajectory.given import given_in
from async_rl.wire.messages import Start

Key = tuple[int, int]
"""(group, sample)"""


@dataclass(slots=True, eq=False)
class Forks:
    """The forks of the groups that a process plays. Within one event loop."""

    plan: RolloutSettings
    samples: int
    """of a group"""
    _waiting: dict[Key, asyncio.Future[Trajectory | None]] = field(default_factory=dict)
    """finished parents, and those that run"""
    _left: dict[int, set[int]] = field(default_factory=dict)
    """samples of each group that are not finished"""

    def expect(self, group: int, samples: Sequence[int]) -> None:
        """These samples of a group are played here."""
        for sample in samples:
            self._waiting[group, sample] = asyncio.get_running_loop().create_future()
        self._left.setdefault(group, set()).update(samples)

    async def ticket(self, ticket: Ticket) -> Ticket:
        """The ticket of an episode, with its start where it is a fork: then its parent is waited for."""
        permit = ticket.permit
        found = parent_of(ticket.sample, self.plan) if permit.split == "train" else None
        if found is None or permit.start is not None:
            return ticket
        waiting = self._waiting.get((permit.group, found[0]))
        parent = None if waiting is None else await asyncio.shield(waiting)
        if parent is None:
            return ticket
        at = place_of(parent, found[1], forks_of(found[0], permit.size or self.samples, self.plan), self.plan)
        start = None if at is None else start_at(parent, at)
        return ticket if start is None else replace(ticket, permit=replace(permit, start=start))

    def planned(self, ticket: Ticket) -> Ticket:
        """A ticket as the plan has it: whether the sample is greedy."""
        greedy = self.plan.greedy and ticket.permit.split == "train" and ticket.sample == 0
        return replace(ticket, greedy=True) if greedy else ticket

    def finished(self, ticket: Ticket, trajectory: Trajectory) -> Trajectory:
        """The trajectory of an episode that has ended, with its fork noted."""
        found = parent_of(ticket.sample, self.plan)
        parent = None if found is None else self._waiting.get((ticket.permit.group, found[0]))
        if parent is not None and parent.done() and (whole := parent.result()) is not None:
            trajectory = with_fork(trajectory, whole)
        self._end(ticket, None if trajectory.failed else trajectory)
        return trajectory

    def gave_up(self, ticket: Ticket) -> None:
        """An episode ended without a trajectory. Its forks begin with the prompt."""
        self._end(ticket, None)

    def _end(self, ticket: Ticket, trajectory: Trajectory | None) -> None:
        group = ticket.permit.group
        waiting = self._waiting.get((group, ticket.sample))
        if waiting is not None and not waiting.done():
            waiting.set_result(trajectory)
        left = self._left.get(group, set())
        left.discard(ticket.sample)
        if not left:
            self._left.pop(group, None)
            for key in [key for key in self._waiting if key[0] == group]:
                del self._waiting[key]


def forks_for(plan: RolloutSettings, samples: int) -> Forks | None:
    """None for a plan in which every answer is sampled from the prompt, and trained."""
    return Forks(plan, samples) if plan.roots or plan.greedy else None


def own_tokens(trajectory: Trajectory) -> list[int]:
    """Places of its policy's tokens in its first context."""
    end = trajectory.contexts[0] if trajectory.contexts else len(trajectory.tokens)
    return [p for turn in trajectory.turns for p in range(turn.start, turn.start + turn.length) if p < end]


def place_of(parent: Trajectory, number: int, forks: int, plan: RolloutSettings) -> int | None:
    """Where fork `number` of so many leaves its parent: the place of the first token that it samples anew. None: there
    is none."""
    own = own_tokens(parent)
    if not own:
        return None
    log = parent.log_behaviour
    if plan.fork == "uncertain_turn":
        end = own[-1]
        turns = [turn for turn in parent.turns if turn.length and own[0] < turn.start <= end]
        first = [(turn.start, min(turn.length, plan.first_tokens)) for turn in turns]
        order = sorted(first, key=lambda one: (float(log[one[0] : one[0] + one[1]].mean()), one[0]))
        return order[number % len(order)][0] if order else None
    places = own if plan.fork == "even" else [p for p in own if np.exp(log[p]) < plan.below]
    places = [p for p in places if p > own[0]]  # there a fork would be a root
    if not places:
        return None
    cuts = -(-forks // plan.per_cut)
    return places[(number // plan.per_cut + 1) * len(places) // (cuts + 1)]


def start_at(parent: Trajectory, at: int) -> Start | None:
    """What a fork of `parent` at this place is given: its turns before it, the last one cut. None: nothing."""
    spans = []
    for begin, length in _spans(parent):
        if begin >= at:
            break
        spans.append((begin, min(length, at - begin)))
        if begin + length > at:
            return _start(parent, spans, cut=True)
    return _start(parent, spans, cut=False) if spans else None


def _start(parent: Trajectory, spans: Sequence[tuple[int, int]], *, cut: bool) -> Start:
    begin, length = spans[-1]
    tokens = parent.tokens[: begin + length].astype("<i4").tobytes()
    return Start(source="fork", share=1.0, tokens=tokens, turns=tuple(spans), open=cut)


def _spans(trajectory: Trajectory) -> list[tuple[int, int]]:
    """(start, length) of its turns in its first context, those included that it was given; a turn that it went on
    within is one."""
    end = trajectory.contexts[0] if trajectory.contexts else len(trajectory.tokens)
    given = given_in(trajectory)
    spans = [*(given.stretches if given is not None else ())]
    for turn in trajectory.turns:
        if not turn.length or turn.start >= end:
            continue
        if given is not None and given.open and spans and turn.start == spans[-1][0] + spans[-1][1]:
            spans[-1] = (spans[-1][0], spans[-1][1] + turn.length)
        else:
            spans.append((turn.start, turn.length))
    return spans


def with_fork(trajectory: Trajectory, parent: Trajectory) -> Trajectory:
    """A fork with the note of where it left its parent; as it is where nothing was taken over."""
    given = given_in(trajectory)
    if given is None or not given.stretches:
        return trajectory
    end = sum(given.stretches[-1])
    shared = sum(place < end for place in own_tokens(parent))
    return replace(trajectory, info={**trajectory.info, FORK: f"{parent.sample}@{shared}"})
