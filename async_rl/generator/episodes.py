"""The episodes that a generator runs: one asyncio task each, from the permit to the finished trajectory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from msgspec.structs import replace

from async_rl.errors import RunFailed
from async_rl.generator.engine import Engine
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, Ticket, make_tickets
from async_rl.generator.task_code import TaskGuard, describe_error, is_ours
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.protocol import Task
from async_rl.trajectory import Trajectory
from async_rl.wire import messages as msg

Key = tuple[int, int]
"""(group, sample)"""


@dataclass(slots=True, eq=False)
class Episode:
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

    running: dict[Key, Episode] = field(default_factory=dict)
    recorded: dict[Key, Trajectory] = field(default_factory=dict)
    """finished turns of episodes of a lost generator, which will be started here"""
    records_dropped: int = 0
    """of them, those whose environment answered otherwise this time"""
    started: int = 0
    """number of sessions opened, which also numbers them for the engine"""
    failure: RunFailed | None = None
    """why this generator has to end: its engine died, or an episode ended without a trajectory"""
    failed: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self, permit: msg.Permit, samples: Iterable[int]) -> None:
        """Start these samples of a permit."""
        for ticket in make_tickets(replace(permit, samples=tuple(samples))):
            episode = self.running[permit.group, ticket.sample] = Episode(ticket)
            episode.task = asyncio.create_task(self._run(episode))

    def record_turns(self, trajectories: Iterable[Trajectory]) -> None:
        """Keep the finished turns of a lost generator for the episodes that will be started from them."""
        self.recorded |= {(t.group, t.sample): t for t in trajectories}

    def abandon(self, groups: Iterable[int]) -> None:
        """End the running episodes of these groups, which the buffer does not want any more."""
        unwanted = set(groups)
        for (group, _), episode in self.running.items():
            if group in unwanted:
                episode.abandoned = True
                if episode.session is not None:
                    episode.session.abandon(msg.ABANDONED)

    def take_unsent(self) -> tuple[Trajectory, ...]:
        """Turns to be saved by the buffer, which count as sent."""
        taken: list[Trajectory] = []
        for episode in self.running.values():
            if episode.unsent is not None:
                taken.append(episode.unsent)
                episode.unsent = None
        return tuple(taken)

    def finished_turns(self) -> tuple[Trajectory, ...]:
        """The finished turns of all running training episodes, for the generator that continues them."""
        sessions = [episode.session for episode in self.running.values() if episode.session is not None]
        return tuple([s.so_far() for s in sessions if s.split == "train" and s.turn > 0])

    async def cancel(self, *, timeout_s: float) -> int:
        """Give up all running episodes and recorded turns, and wait so long for their end. Returns their number."""
        tasks = []
        for episode in self.running.values():
            episode.given_up = True
            if episode.task is not None:
                episode.task.cancel()
                tasks.append(episode.task)
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        self.running.clear()
        self.recorded.clear()
        return len(tasks)

    async def _run(self, episode: Episode) -> None:
        """One episode. It ends in one trajectory, or ends this generator, unless it was given up."""
        key = (episode.ticket.permit.group, episode.ticket.sample)
        try:
            trajectory = await self._play(episode, self.recorded.pop(key, None))
        except BaseException as error:
            if episode.given_up:
                if episode.session is not None:
                    episode.session.abandon("given up")
                raise
            self.failure = self.failure or _failure(error, key)
            self.failed.set()
            if is_ours(error):
                raise
            return
        self.on_finished(trajectory)
        if self.running.get(key) is episode:  # else it was given up, and its permit may have been started anew
            del self.running[key]
        self.on_change()

    async def _play(self, episode: Episode, record: Trajectory | None) -> Trajectory:
        """The trajectory of an episode. Turns that a lost generator recorded of it are not sampled again."""
        session = self._open(episode, record)
        run = partial(run_episode, self.task, ticket=episode.ticket, timeout_s=self.timeout_s, guard=self.guard)
        try:
            trajectory = await run(session=session)
            if session.diverged:
                self.records_dropped += 1
                session = self._open(episode, None)
                trajectory = await run(session=session)
        except asyncio.CancelledError:
            if episode.given_up:
                raise
            # What the task runs has cancelled this asyncio task too (`asyncio.all_tasks`).
            reason = "CancelledError: the task or its reward cancelled asyncio tasks that are not its own"
            return session.finish(reward=0.0, failed="error", reason=reason)
        return trajectory

    def _open(self, episode: Episode, record: Trajectory | None) -> EpisodeSession:
        self.started += 1
        ticket = episode.ticket

        def on_turn() -> None:
            if time.time() - session.started_at > self.save_turns_after_s:
                episode.unsent = session.so_far()
                self.on_change()

        session = episode.session = EpisodeSession(
            engine=self.engine,
            tokenizer=self.tokenizer,
            ticket=ticket,
            session_id=self.started,
            max_context=self.engine.max_context,
            max_turns=self.max_turns,
            record=record,
            generator=self.generator,
            on_turn=on_turn if ticket.permit.split == "train" else None,
        )
        if episode.abandoned:
            session.abandon(msg.ABANDONED)
        return session


def _failure(error: BaseException, key: Key) -> RunFailed:
    """Why the generator ends: the engine's own cause, or an error that no trajectory could be made of."""
    if isinstance(error, RunFailed):
        return error
    return RunFailed(f"sample {key[1]} of group {key[0]} ended without a trajectory: {describe_error(error)}")
