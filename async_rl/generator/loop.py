"""The generator process: permits in, trajectories out, weights swapped in flight.

Who waits for whom: episodes wait for the engine; the engine waits for work; this process waits for
permits. It never waits for the trainer: new weights are announced by the buffer and pulled between
two decoding steps.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.generator.engine import Engine
from async_rl.generator.outbox import AGAIN_S, Outbox, Patience, no_event
from async_rl.generator.session import EpisodeSession, Ticket, run_episode
from async_rl.task.protocol import Task
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError
from async_rl.trajectory.types import sample_seed
from async_rl.weights.canary import probe_tokens
from async_rl.wire import messages as msg
from async_rl.wire.channel import AsyncDealer
from async_rl.wire.frames import HARMLESS, portions
from async_rl.wire.heartbeat import Activity

if TYPE_CHECKING:
    from async_rl.generator.pull import WeightSource
    from async_rl.model.tokenizer import Tokenizer


# -------------------- options
# What the loop of a generator needs of the settings.


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    """Example: `make_options(settings, "generator-0")`."""

    name: str
    max_sequences: int
    group_size: int
    max_turns: int
    episode_timeout_s: float
    save_turns_after_s: float
    """finished turns of episodes that have run longer are kept by the buffer"""
    timeout_s: float
    """longest silence of the buffer, and longest wait for it to acknowledge something"""
    stall_report_s: float
    """longest wait for that which is not reported"""
    joined: bool = False
    """it came by itself; the launcher knows nothing of it"""


def make_options(settings: Settings, name: str, *, joined: bool = False) -> GeneratorOptions:
    """What the loop of generator `name` needs. `joined`: by itself, not started by the launcher."""
    chosen = settings.generator
    return GeneratorOptions(
        name=name,
        max_sequences=chosen.max_sequences,
        group_size=settings.batch.group_size,
        max_turns=chosen.max_turns,
        episode_timeout_s=chosen.episode_timeout_s,
        save_turns_after_s=chosen.save_turns_after_s,
        timeout_s=settings.wire.timeout_s,
        stall_report_s=settings.wire.stall_report_s,
        joined=joined,
    )


FLUSH_S = 0.004
"""finished trajectories are gathered this long into one message"""
STATUS_S = 0.2
"""interval of the standing sent to the buffer"""


@dataclass(slots=True)
class GeneratorLoop:
    """A few coroutines on one event loop around one engine."""

    options: GeneratorOptions
    engine: Engine
    task: Task
    tokenizer: Tokenizer
    dealer: AsyncDealer
    weights: WeightSource
    activity: Activity = field(default_factory=Activity)
    """tells the heartbeat what is done"""
    buffer_silent_s: Callable[[], float] = lambda: 0.0
    event: Callable[..., None] = no_event
    """writes an event of the run"""
    patience: Patience = field(init=False)
    session: int = 0
    """of the last Hello"""
    running: dict[tuple[int, int], asyncio.Task[None]] = field(default_factory=dict)
    abandoned: set[tuple[int, int]] = field(default_factory=set)
    """running episodes that nobody wants any more"""
    outbox: Outbox = field(default_factory=Outbox)
    begun: dict[tuple[int, int], Trajectory] = field(default_factory=dict)
    """newest finished turns of long episodes, to be sent"""
    recorded: dict[tuple[int, int], Trajectory] = field(default_factory=dict)
    """what a lost generator had done of episodes that are to be started here"""
    records_dropped: int = 0
    """of them, those whose environment answered otherwise this time"""
    sessions: dict[tuple[int, int], EpisodeSession] = field(default_factory=dict)
    """of the running episodes"""
    permits_received: int = 0
    """in all since the last Hello, as the buffer counts them"""
    told_limit: int = -1
    announced: int = 0
    """newest version the buffer spoke of"""
    loaded: bool = False
    """weights of the run are in the engine"""
    loading: bool = False
    """newer weights are being read"""
    episodes: int = 0
    started: float = 0.0
    leaving: str = ""
    """why it is to end"""
    stopped: str = ""
    """why the buffer ended the run"""
    probe: tuple[int, ...] = ()
    """tokens whose log-probs are shown after each load"""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    failure: RunFailed | None = None
    """of the engine: no episode can go on"""
    leave_now: asyncio.Event = field(default_factory=asyncio.Event)
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    new_weights: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        o = self.options
        self.patience = Patience(o.name, o.timeout_s, o.stall_report_s, self.buffer_silent_s, self.event)

    async def run(self) -> None:
        """Until the buffer says stop. Raises RunFailed when the buffer is silent for too long."""
        self.started = time.monotonic()
        await self._hello()
        self.probe = probe_tokens(self.task, self.tokenizer, self.engine.max_context)
        self.activity.now("waiting for the trainer's first weights")
        await self._pull_weights()
        await self._show_weights()
        await self._ask()
        loops: list[Coroutine[Any, Any, None]] = [
            self._receive(),
            self._send(),
            self._update(),
            self._report(),
            self._await_leave(),
            self._await_failure(),
        ]
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

    def leave(self, reason: str) -> None:
        """End soon: what is done is handed over, what is not goes to others. Call it in any thread."""
        self.leaving = reason
        self.loop.call_soon_threadsafe(self.leave_now.set)

    # ---------------------------------------------------------------- loops

    async def _receive(self) -> None:
        """What the buffer says. Ends when it says stop."""
        while True:
            try:
                message = await self.dealer.receive()
            except WireError as error:
                raise RunFailed(f"{self.options.name} cannot read what the buffer sends: {error}") from None
            match message:
                case msg.Permits(session=self.session):
                    self._take(message)
                    await self._ask()
                case msg.Turns(trajectories=trajectories):
                    self.recorded |= {(t.group, t.sample): t for t in trajectories}
                case msg.Unknown(session=self.session):
                    await self._join_anew()
                case msg.Accepted(pairs=pairs):
                    self.outbox.acknowledge(pairs)
                case msg.Abandon(groups=groups):
                    for key in [key for key in self.running if key[0] in groups]:
                        self.abandoned.add(key)
                        if key in self.sessions:
                            self.sessions[key].abandon(msg.ABANDONED)
                case msg.NewWeights(version=version):
                    self.announced = max(self.announced, version)
                    self.new_weights.set()
                case msg.Stop(reason=reason):
                    self.stopped = reason or "it is done"
                    return
                case msg.Refused(what=what, reason=reason, kind=kind, pairs=pairs):
                    if kind not in HARMLESS:
                        raise RunFailed(f"{self.options.name}: the buffer refused {what}: {reason}")
                    self.outbox.acknowledge(pairs)
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
                await self._send_turns(turns)
            await self._send_finished(self.outbox.take(time.monotonic()))
            await self._ask()

    async def _update(self) -> None:
        """Swap weights in flight whenever newer ones are announced."""
        while True:
            await self.new_weights.wait()
            self.new_weights.clear()
            while self.announced > self.engine.version:  # a stream may bring an older one than was announced last
                self.loading = True
                await self._pull_weights()
                self.loading = False
                await self._show_weights()  # before any token sampled under a permit for this version
                await self.dealer.send(msg.Holds(version=self.engine.version))

    async def _report(self) -> None:
        """The whole standing at a steady pace; also the watch over a silent buffer."""
        self.activity.now("waiting for permits")
        self.activity.looping = True
        before = time.monotonic()
        while True:
            self._tell_heartbeat()
            await self._send_status()
            await asyncio.sleep(STATUS_S)
            now = time.monotonic()
            if now - before > AGAIN_S:  # stopped, or held up by a task: nothing could be heard meanwhile
                self.outbox.excuse(now - before)
            before = now
            await self._send_finished(self.outbox.late(now))
            self.patience.look(self.outbox, now)

    async def _await_leave(self) -> None:
        """Told to end: hand over what is done. Its end ends the loop."""
        await self.leave_now.wait()
        await self._send_turns(self._finished_turns())
        await self._send_finished(self.outbox.take(time.monotonic()))
        await self.dealer.send(msg.Leave(name=self.options.name, reason=self.leaving, session=self.session))

    async def _await_failure(self) -> None:
        """The engine died under the episodes: that is this process's end, not theirs. They go to others."""
        await self.failed.wait()
        assert self.failure is not None
        raise self.failure

    # ---------------------------------------------------------------- steps

    async def _hello(self) -> None:
        self.session = time.time_ns()
        await self.dealer.send(
            msg.Hello(
                role="generator",
                name=self.options.name,
                pid=os.getpid(),
                session=self.session,
                detail={msg.JOINED: True} if self.options.joined else {},
            )
        )

    async def _join_anew(self) -> None:
        """The buffer gave this generator up (it was stopped, or cut off): what it held is others' now. Finished
        trajectories are kept and sent again until they are acknowledged."""
        await self._send_turns(self._finished_turns())
        given_up = list(self.running.values())
        for episode in given_up:
            episode.cancel()
        if given_up:
            await asyncio.wait(given_up, timeout=AGAIN_S)
        for held in (self.running, self.sessions, self.begun, self.recorded, self.abandoned):
            held.clear()
        self.event("generator_rejoined", name=self.options.name, episodes_dropped=len(given_up), time=time.time())
        self.permits_received, self.told_limit = 0, -1
        await self._hello()
        await self._ask()

    async def _send_turns(self, turns: tuple[Trajectory, ...]) -> None:
        for some in portions(turns):
            await self.dealer.send(msg.Turns(trajectories=some))

    async def _send_finished(self, trajectories: tuple[Trajectory, ...]) -> None:
        for some in portions(trajectories):
            await self.dealer.send(msg.Finished(trajectories=some))

    def _finished_turns(self) -> tuple[Trajectory, ...]:
        """Of all running episodes, for whoever goes on with them."""
        return tuple([s.so_far() for s in self.sessions.values() if s.split == "train" and s.turn > 0])

    def _tell_heartbeat(self) -> None:
        running = self.engine.stats().running
        if self.loading:
            kind, what = "loading", f"loading weights version {self.announced}"
        elif running:
            kind, what = "decoding", f"decoding {running} sequences"
        elif self.running:
            kind, what = "in tasks", f"in tasks or rewards of {len(self.running)} episodes"
        else:
            kind, what = "waiting", "waiting for permits"
        same = self.activity.state()[0].startswith(kind)
        (self.activity.still if same else self.activity.now)(what)

    async def _pull_weights(self) -> None:
        # the first ones always: a model folder of another host may hold others than the run began with
        await self.weights.bring(self.engine, first=not self.loaded)
        self.loaded = True

    async def _show_weights(self) -> None:
        """Evidence of the weights the engine holds; the trainer knows what it must be."""
        shown = await self.engine.fingerprint()
        log_probs = await self.engine.probe(self.probe)
        await self.dealer.send(
            msg.Canary(
                name=self.options.name,
                version=self.engine.version,
                digests=tuple([(name, digest) for name, digest in shown.items() if digest is not None]),
                split=tuple([name for name, digest in shown.items() if digest is None]),
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
            await self.dealer.send(msg.Want(limit=limit, version=self.engine.version, session=self.session))

    def _in_hand(self) -> set[tuple[int, int]]:
        """(group, sample) of everything running, or finished and not acknowledged."""
        return {*self.running, *self.outbox.pairs}

    async def _send_status(self) -> None:
        stats = self.engine.stats()
        await self.dealer.send(
            msg.Status(
                name=self.options.name,
                session=self.session,
                version=self.engine.version,
                limit=max(0, self.told_limit),
                groups=tuple({group for group, _ in self._in_hand()}),
                busy_seconds=stats.busy_seconds,
                wall_seconds=time.monotonic() - self.started,
                tokens_generated=stats.tokens_generated,
                running=stats.running,
                waiting=stats.waiting,
            )
        )

    def _take(self, message: msg.Permits) -> None:
        self.permits_received = max(self.permits_received, message.granted)
        in_hand = self._in_hand()
        for permit in message.permits:
            self._start(permit, [sample for sample in permit.samples if (permit.group, sample) not in in_hand])
        self._tell_heartbeat()

    def _start(self, permit: msg.Permit, samples: Sequence[int]) -> None:
        for sample in samples:
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
        limit = self.options.episode_timeout_s
        try:
            trajectory = await run_episode(self.task, session, ticket, timeout_s=limit)
            if session.diverged:
                self.records_dropped += 1
                session = self._session(ticket, None)
                trajectory = await run_episode(self.task, session, ticket, timeout_s=limit)
        except asyncio.CancelledError:
            session.abandon("given up")
            raise
        except RunFailed as error:
            self.failure = self.failure or error
            self.failed.set()
            return
        self.outbox.put(trajectory)
        if self.running.get(key) is asyncio.current_task():  # else it was given up and somebody began anew
            for held in (self.running, self.sessions, self.begun):
                held.pop(key, None)
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
            generator=self.options.name,
            on_turn=on_turn if ticket.split == "train" else None,
        )
        self.sessions[ticket.group, ticket.sample] = session
        if (ticket.group, ticket.sample) in self.abandoned:
            session.abandon(msg.ABANDONED)
        return session
