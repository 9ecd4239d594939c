"""The episodes that a generator runs: one asyncio task each, from the permit to the finished trajectory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from msgspec import Struct
from msgspec.structs import replace

from async_rl.errors import RunFailed
from async_rl.generator.engine import Engine
from async_rl.generator.facilities import Facilities
from async_rl.generator.forks import Forks
from async_rl.generator.group_reward import STRANGE_CANCEL, GroupJudge, Played, WaitingGroups
from async_rl.generator.rollout import play_episode
from async_rl.generator.session import EpisodeSession, Ticket, make_tickets
from async_rl.generator.step_mark import EPISODE
from async_rl.generator.task_code import TaskGuard, describe_error, is_ours
from async_rl.generator.teachers import TeacherServers
from async_rl.model.tokenizer import Tokenizer
from async_rl.steady_clock import steady_time
from async_rl.task.protocol import Task
from async_rl.task.weigh import Weighed, Weights, has_group_reward
from async_rl.trajectory import Trajectory
from async_rl.wire import messages as msg

MOST_KEPT = 4096
"""pieces whose session is remembered"""
Key = tuple[int, int]
"""(group, sample)"""


class Episode(Struct, eq=False):
    """One running episode."""

    ticket: Ticket
    task: asyncio.Task[None] | None = None
    session: EpisodeSession | None = None
    """None until the asyncio task runs for the first time"""
    given_up: bool = False
    """its asyncio task was cancelled by this generator"""
    abandoned: bool = False
    """the buffer does not want it any more"""
    unsent: Trajectory | None = None
    """its finished turns, where the buffer does not have them yet"""


@dataclass(slots=True, kw_only=True)
class Episodes:
    """Starts episodes and keeps what is known of those that run; each finished trajectory goes to `on_finished`."""

    task: Task
    engine: Engine
    tokenizer: Tokenizer
    generator: str
    """its name, for the record of each trajectory"""
    max_turns: int
    timeout_s: float
    """longest time of one episode"""
    save_turns_after_s: float
    """finished turns of episodes that have run longer are to be saved by the buffer"""
    on_finished: Callable[[Trajectory], None]
    on_change: Callable[[], None]
    """an episode has ended, or has turns to save"""
    guard: TaskGuard = field(default_factory=TaskGuard)
    weights: Weights = field(default_factory=Weights)
    """of the named parts of a reward"""
    facilities: Facilities | None = None
    teachers: TeacherServers | None = None
    """servers that are asked about finished training episodes"""
    forks: Forks | None = None
    """answers that go on from others of their group"""
    window: int = 0
    """tokens that a training episode samples before it is cut; 0: it is whole"""

    running: dict[Key, Episode] = field(default_factory=dict)
    recorded: dict[Key, Trajectory] = field(default_factory=dict)
    """finished turns of episodes of a lost generator, which will be started here"""
    records_dropped: int = 0
    """of them, those whose environment answered otherwise this time"""
    kept: OrderedDict[Key, int] = field(default_factory=OrderedDict)
    """number of the session of each piece that was cut here lately: the engine may still have its cache"""
    started: int = 0
    """number of sessions opened, which also numbers them for the engine"""
    failure: RunFailed | None = None
    """why this generator has to end: its engine died, or an episode ended without a trajectory"""
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    groups: WaitingGroups = field(init=False)
    """finished episodes that wait for the others of their group, where the task judges groups"""

    def __post_init__(self) -> None:
        judge = GroupJudge(task=self.task, weights=self.weights, guard=self.guard, timeout_s=self.timeout_s)
        self.groups = WaitingGroups(judge=judge, on_finished=self._finished, on_failure=self._fail)

    def start(self, permit: msg.Permit, samples: Iterable[int]) -> None:
        """Start these samples of a permit; where the task judges groups, all of the group."""
        chosen = tuple(samples)
        if has_group_reward(self.task):
            chosen = self.groups.open(permit, chosen)
        if self.forks is not None:
            self.forks.expect(permit.group, chosen)
        for ticket in make_tickets(replace(permit, samples=chosen)):
            ticket = self.forks.planned(ticket) if self.forks is not None else ticket
            episode = self.running[permit.group, ticket.sample] = Episode(ticket)
            episode.task = asyncio.create_task(self._run(episode))

    def record_turns(self, trajectories: Iterable[Trajectory]) -> None:
        """Keep the finished turns of a lost generator for the episodes that will be started from them."""
        self.recorded |= {(t.group, t.sample): t for t in trajectories}

    def abandon(self, groups: Iterable[int]) -> None:
        """End the running episodes of these groups, which the buffer does not want any more."""
        unwanted = set(groups)
        self.groups.abandon(unwanted)
        for (group, _), episode in self.running.items():
            if group in unwanted:
                episode.abandoned = True
                if episode.session is not None:
                    episode.session.abandon(msg.ABANDONED)

    def take_unsent(self) -> tuple[Trajectory, ...]:
        """Turns to be saved by the buffer, which count as sent."""
        taken = self.groups.take_unsent()
        for episode in self.running.values():
            if episode.unsent is not None:
                taken.append(episode.unsent)
                episode.unsent = None
        return tuple(taken)

    def finished_turns(self) -> tuple[Trajectory, ...]:
        """The finished turns of all training episodes that are not sent, for the generator that continues them."""
        sessions = [episode.session for episode in self.running.values() if episode.session is not None]
        sessions += self.groups.sessions()
        return tuple([s.so_far() for s in sessions if s.split == "train" and s.turn > 0])

    async def cancel(self, *, timeout_s: float) -> int:
        """Give up all running episodes and recorded turns, and wait so long for their end. Returns their number."""
        tasks = []
        for episode in self.running.values():
            episode.given_up = True
            if episode.task is not None:
                episode.task.cancel()
                tasks.append(episode.task)
        tasks += self.groups.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        self.running.clear()
        self.recorded.clear()
        return len(tasks)

    @property
    def in_hand(self) -> set[Key]:
        """(group, sample) of every episode that runs, or waits for the others of its group."""
        return {*self.running, *self.groups.keys()}

    async def _run(self, episode: Episode) -> None:
        """One episode. It ends in one trajectory, or ends this generator, unless it was given up."""
        key = (episode.ticket.permit.group, episode.ticket.sample)
        EPISODE.set(key)
        try:
            if self.forks is not None:
                episode.ticket = await self.forks.ticket(episode.ticket)
            trajectory, weighed = await self._play(episode, self.recorded.pop(key, None))
            if self.forks is not None:
                trajectory = self.forks.finished(episode.ticket, trajectory)
            if self.teachers is not None and not episode.given_up:
                trajectory = await self.teachers.noted(trajectory)
        except BaseException as error:
            if self.forks is not None:
                self.forks.gave_up(episode.ticket)
            if episode.given_up:
                if episode.session is not None:
                    episode.session.abandon("given up")
                raise
            self._fail(_failure(error, key))
            if is_ours(error):
                raise
            return
        if trajectory.ended == "window" and episode.session is not None:
            self.kept[key] = episode.session.session_id
            if len(self.kept) > MOST_KEPT:
                self.kept.popitem(last=False)
        waits = False
        if not episode.given_up and episode.session is not None:
            played = Played(trajectory=trajectory, weighed=weighed, session=episode.session, unsent=episode.unsent)
            waits = self.groups.add(played)
        if self.running.get(key) is episode:  # else it was given up, and its permit may have been started anew
            del self.running[key]
        if not waits:
            self._finished(trajectory)

    def _finished(self, trajectory: Trajectory) -> None:
        self.on_finished(trajectory)
        self.on_change()

    def _fail(self, failure: RunFailed) -> None:
        """This generator has to end."""
        self.failure = self.failure or failure
        self.failed.set()

    async def _play(self, episode: Episode, record: Trajectory | None) -> tuple[Trajectory, Weighed]:
        """The trajectory of an episode. Turns that a lost generator recorded of it are not sampled again."""
        session = self._open(episode, record)
        run = partial(
            play_episode,
            self.task,
            ticket=episode.ticket,
            timeout_s=self.timeout_s,
            guard=self.guard,
            weights=self.weights,
        )
        try:
            made = await run(session=session)
            if session.diverged:
                self.records_dropped += 1
                session = self._open(episode, None)
                made = await run(session=session)
        except asyncio.CancelledError:
            if episode.given_up:
                raise
            # What the task runs has cancelled this asyncio task too (`asyncio.all_tasks`).
            return session.finish(reward=0.0, failed="error", reason=STRANGE_CANCEL), Weighed(total=0.0)
        return made

    def _open(self, episode: Episode, record: Trajectory | None) -> EpisodeSession:
        self.started += 1
        ticket = episode.ticket
        start = ticket.permit.start
        before = None if start is None else self.kept.pop((start.group, 0), None)

        def on_turn() -> None:
            if steady_time() - session.started_at > self.save_turns_after_s:
                episode.unsent = session.so_far()
                self.on_change()

        session = episode.session = EpisodeSession(
            engine=self.engine,
            tokenizer=self.tokenizer,
            ticket=ticket,
            session_id=self.started if before is None else before,
            max_context=self.engine.max_context,
            max_turns=self.max_turns,
            record=record,
            generator=self.generator,
            window=self.window,
            on_turn=on_turn if ticket.permit.split == "train" else None,
            agents=self.facilities.agents if self.facilities is not None else None,
            slots=self.facilities.slots if self.facilities is not None else None,
        )
        if episode.abandoned:
            session.abandon(msg.ABANDONED)
        return session


def _failure(error: BaseException, key: Key) -> RunFailed:
    """Why the generator ends: the engine's own cause, or an error that no trajectory could be made of."""
    if isinstance(error, RunFailed):
        return error
    return RunFailed(f"sample {key[1]} of group {key[0]} ended without a trajectory: {describe_error(error)}")
