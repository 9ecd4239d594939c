"""The episodes that a generator runs: one asyncio task each, from the permit to the finished trajectory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from async_rl.errors import RunFailed
from async_rl.generator.engine import Engine
from async_rl.generator.session import EpisodeSession, Ticket, make_tickets, run_episode
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

    running: dict[Key, Episode] = field(default_factory=dict)
    recorded: dict[Key, Trajectory] = field(default_factory=dict)
    """finished turns of episodes of a lost generator, which will be started here"""
    records_dropped: int = 0
    """of them, those whose environment answered otherwise this time"""
    started: int = 0
    """number of sessions opened, which also numbers them for the engine"""
    engine_failure: RunFailed | None = None
    engine_failed: asyncio.Event = field(default_factory=asyncio.Event)

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
        tasks = self.tasks
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        self.running.clear()
        self.recorded.clear()
        return len(tasks)

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return [episode.task for episode in self.running.values() if episode.task is not None]

    async def _run(self, episode: Episode) -> None:
        """One episode. Turns that a lost generator recorded of it are not sampled again."""
        key = (episode.ticket.permit.group, episode.ticket.sample)
        session = self._open(episode, self.recorded.pop(key, None))
        try:
            trajectory = await run_episode(self.task, session, episode.ticket, timeout_s=self.timeout_s)
            if session.diverged:
                self.records_dropped += 1
                session = self._open(episode, None)
                trajectory = await run_episode(self.task, session, episode.ticket, timeout_s=self.timeout_s)
        except asyncio.CancelledError:
            session.abandon("given up")
            raise
        except RunFailed as error:
            self.engine_failure = self.engine_failure or error
            self.engine_failed.set()
            return
        self.on_finished(trajectory)
        if self.running.get(key) is episode:  # else it was given up, and its permit may have been started anew
            del self.running[key]
        self.on_change()

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
