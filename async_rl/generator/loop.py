"""The generator process: permits in, trajectories out, weights swapped in flight.

Who waits for whom: episodes wait for the engine; the engine waits for work; this process waits for
permits. It never waits for the trainer: new weights are announced by the buffer and pulled between
two decoding steps.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from async_rl.errors import RunFailed
from async_rl.generator.engine import Engine
from async_rl.generator.session import EpisodeSession, Ticket, TurnLimit
from async_rl.task.protocol import Task
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError
from async_rl.trajectory.seed import sample_seed
from async_rl.weights.canary import probe_tokens
from async_rl.wire import messages as msg
from async_rl.wire.channel import AsyncDealer
from async_rl.wire.frames import portions
from async_rl.wire.refusal import HARMLESS

if TYPE_CHECKING:
    from async_rl.generator.build import WeightSource
    from async_rl.model.tokenizer import Tokenizer

FLUSH_S = 0.004
"""finished trajectories are gathered this long into one message"""
STATUS_S = 0.2
"""interval of the counters sent to the buffer"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    """What the loop needs of the settings."""

    name: str
    max_sequences: int
    group_size: int
    max_turns: int
    episode_timeout_s: float
    save_turns_after_s: float
    """finished turns of episodes that have run longer are kept by the buffer"""
    timeout_s: float
    """longest silence of the buffer while something is unacknowledged"""


@dataclass(slots=True)
class GeneratorLoop:
    """A few coroutines on one event loop around one engine."""

    options: GeneratorOptions
    engine: Engine
    task: Task
    tokenizer: Tokenizer
    dealer: AsyncDealer
    weights: WeightSource
    running: dict[tuple[int, int], asyncio.Task[None]] = field(default_factory=dict)
    sessions: dict[tuple[int, int], EpisodeSession] = field(default_factory=dict)
    """of the running episodes"""
    abandoned: set[tuple[int, int]] = field(default_factory=set)
    """running episodes that nobody wants any more"""
    outbox: list[Trajectory] = field(default_factory=list)
    begun: dict[tuple[int, int], Trajectory] = field(default_factory=dict)
    """newest finished turns of long episodes, to be sent"""
    recorded: dict[tuple[int, int], Trajectory] = field(default_factory=dict)
    """what a lost generator had done of episodes that are to be started here"""
    records_dropped: int = 0
    """of them, those whose environment answered otherwise this time"""
    unacknowledged: dict[tuple[int, int], float] = field(default_factory=dict)
    permits_received: int = 0
    told_limit: int = -1
    announced: int = 0
    """newest version the buffer spoke of"""
    episodes: int = 0
    started: float = 0.0
    stopping: bool = False
    probe: tuple[int, ...] = ()
    """tokens whose log-probs are shown after each load"""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    new_weights: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Until the buffer says stop. Raises RunFailed when the buffer is silent for too long."""
        self.started = time.monotonic()
        await self.dealer.send(msg.Hello(role="generator", name=self.options.name, pid=os.getpid()))
        self.probe = probe_tokens(self.task, self.tokenizer, self.engine.max_context)
        await self._pull_weights()
        await self._show_weights()
        await self._ask()
        loops: list[Coroutine[Any, Any, None]] = [self._receive(), self._send(), self._update(), self._report()]
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in [*tasks, *self.running.values()]:
                task.cancel()
            await asyncio.gather(*tasks, *self.running.values(), return_exceptions=True)
            await self.engine.close()

    # ---------------------------------------------------------------- loops

    async def _receive(self) -> None:
        """What the buffer says. Ends when it says stop."""
        while True:
            try:
                message = await self.dealer.receive()
            except WireError as error:
                raise RunFailed(f"{self.options.name} cannot read what the buffer sends: {error}") from None
            match message:
                case msg.Permits(permits=permits):
                    for permit in permits:
                        self._start(permit)
                    await self._ask()
                case msg.Turns(trajectories=trajectories):
                    self.recorded |= {(t.group, t.sample): t for t in trajectories}
                case msg.Accepted(pairs=pairs):
                    for group, sample in pairs:
                        self.unacknowledged.pop((group, sample), None)
                case msg.Abandon(groups=groups):
                    for key in [key for key in self.running if key[0] in groups]:
                        self.abandoned.add(key)
                        if key in self.sessions:
                            self.sessions[key].abandon(msg.ABANDONED)
                case msg.NewWeights(version=version):
                    self.announced = max(self.announced, version)
                    self.new_weights.set()
                case msg.Stop():
                    return
                case msg.Refused(what=what, reason=reason, kind=kind, pairs=pairs):
                    if kind not in HARMLESS:
                        raise RunFailed(f"{self.options.name}: the buffer refused {what}: {reason}")
                    for pair in pairs:
                        self.unacknowledged.pop(pair, None)
                case _:
                    pass

    async def _send(self) -> None:
        """Finished trajectories, gathered for a moment, and the room they left."""
        while True:
            await self.changed.wait()
            await asyncio.sleep(FLUSH_S)
            self.changed.clear()
            if self.begun:
                turns, self.begun = tuple(self.begun.values()), {}
                for some in portions(turns):
                    await self.dealer.send(msg.Turns(trajectories=some))
            if self.outbox:
                batch, self.outbox = tuple(self.outbox), []
                now = time.monotonic()
                for trajectory in batch:
                    self.unacknowledged[trajectory.group, trajectory.sample] = now
                for some in portions(batch):
                    await self.dealer.send(msg.Finished(trajectories=some))
            await self._ask()

    async def _update(self) -> None:
        """Swap weights in flight whenever newer ones are announced."""
        while True:
            await self.new_weights.wait()
            self.new_weights.clear()
            while self.announced > self.engine.version:  # a stream may bring an older one than was announced last
                await self._pull_weights()
                await self._show_weights()  # before any token sampled under a permit for this version
                await self.dealer.send(msg.Holds(version=self.engine.version))

    async def _report(self) -> None:
        """Counters at a steady pace; also the watch over a silent buffer."""
        while True:
            await self._send_status()
            await asyncio.sleep(STATUS_S)
            oldest = min(self.unacknowledged.values(), default=None)
            if oldest is not None and time.monotonic() - oldest > self.options.timeout_s:
                raise RunFailed(
                    f"{self.options.name} waited {self.options.timeout_s:.0f} s for the buffer to acknowledge "
                    f"{len(self.unacknowledged)} trajectories"
                )

    # ---------------------------------------------------------------- steps

    async def _pull_weights(self) -> None:
        # Copying a large model must not stop the other coroutines.
        version, tensors = await asyncio.to_thread(self.weights.read)
        if version > self.engine.version:
            await self.engine.load(tensors, version)

    async def _show_weights(self) -> None:
        """Evidence of the weights the engine holds; the trainer knows what it must be."""
        digests = await self.engine.fingerprint()
        log_probs = await self.engine.probe(self.probe)
        await self.dealer.send(
            msg.Canary(
                name=self.options.name,
                version=self.engine.version,
                digests=tuple(digests.items()),
                log_probs=tuple([float(value) for value in log_probs]),
            )
        )

    async def _ask(self) -> None:
        """Tell the buffer how many permits fit, as a total since Hello, so that permits on their way
        are never counted twice."""
        free = max(0, self.options.max_sequences - len(self.running)) // self.options.group_size
        limit = self.permits_received + free
        if limit > self.told_limit:
            self.told_limit = limit
            await self.dealer.send(msg.Want(limit=limit, version=self.engine.version))

    async def _send_status(self) -> None:
        stats = self.engine.stats()
        await self.dealer.send(
            msg.Status(
                name=self.options.name,
                version=self.engine.version,
                busy_seconds=stats.busy_seconds,
                wall_seconds=time.monotonic() - self.started,
                tokens_generated=stats.tokens_generated,
                running=stats.running,
                waiting=stats.waiting,
            )
        )

    def _start(self, permit: msg.Permit) -> None:
        self.permits_received += 1
        for sample in permit.samples:
            ticket = Ticket(
                group=permit.group,
                sample=sample,
                problem=permit.problem,
                split=permit.split,
                seed=sample_seed(permit.seed, sample),
                temperature=permit.temperature,
            )
            episode = asyncio.create_task(self._episode(ticket))
            self.running[permit.group, sample] = episode

    async def _episode(self, ticket: Ticket) -> None:
        """One episode from permit to outbox; begun by a lost generator, it goes on behind its last turn."""
        key = (ticket.group, ticket.sample)
        session = self._session(ticket, self.recorded.pop(key, None))
        trajectory = await run_episode(self.task, session, ticket, timeout_s=self.options.episode_timeout_s)
        if session.diverged:
            self.records_dropped += 1
            session = self._session(ticket, None)
            trajectory = await run_episode(self.task, session, ticket, timeout_s=self.options.episode_timeout_s)
        self.begun.pop(key, None)
        self.outbox.append(trajectory)
        del self.running[key], self.sessions[key]
        self.abandoned.discard(key)
        self.changed.set()

    def _session(self, ticket: Ticket, record: Trajectory | None) -> EpisodeSession:
        self.episodes += 1

        def on_turn() -> None:
            if time.time() - session.started_at > self.options.save_turns_after_s:
                self.begun[ticket.group, ticket.sample] = session.so_far()
                self.changed.set()

        session = EpisodeSession(
            engine=self.engine,
            tokenizer=self.tokenizer,
            ticket=ticket,
            session_id=self.episodes,
            max_context=self.engine.max_context,
            max_turns=self.options.max_turns,
            record=record,
            on_turn=on_turn if ticket.split == "train" else None,
        )
        self.sessions[ticket.group, ticket.sample] = session
        if (ticket.group, ticket.sample) in self.abandoned:
            session.abandon(msg.ABANDONED)
        return session


async def run_episode(task: Task, session: EpisodeSession, ticket: Ticket, *, timeout_s: float) -> Trajectory:
    """Roll the task out. Whatever the task or its reward raises ends this trajectory, with the reason."""
    try:
        problem = task.problems(ticket.split)[ticket.problem]
        session.begin(problem)
        async with asyncio.timeout(timeout_s):
            reward = float(await task.rollout(problem, session))
    except TurnLimit:
        return session.finish(reward=0.0, failed="turn_limit")
    except TimeoutError:
        return session.finish(reward=0.0, failed="error", reason=f"the episode took more than {timeout_s:g} s")
    except ConnectionAbortedError as error:
        return session.finish(reward=0.0, failed="aborted", reason=str(error))
    except Exception as error:  # the task is the user's code: reported, and ends this trajectory
        return session.finish(reward=0.0, failed="error", reason=f"{type(error).__name__}: {error}")
    if not math.isfinite(reward):
        return session.finish(reward=0.0, failed="error", reason=f"the reward is {reward}")
    return session.finish(reward=reward)
