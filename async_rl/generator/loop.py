"""The generator process: permits in, trajectories out, weights swapped in flight.

The loop is a few coroutines around one engine:

- `_receive` handles the buffer's messages: permits start episodes, announcements wake `_swap_weights`;
- episodes (episodes.py) ask the engine for turns; the engine decodes all of them together, step by step;
- `_send` sends finished trajectories, which stay in the outbox until acknowledged, and requests permits again;
- `_swap_weights` loads announced weights between two decoding steps and sends evidence of them;
- `_report` sends the status at a steady pace, resends what is late and checks that the buffer lives.

Who waits for whom: episodes wait for the engine; the engine waits for work; this process waits for permits. It never
waits for the trainer: new weights are announced by the buffer and pulled.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from async_rl.config import Settings
from async_rl.config.derived import task_limit_s
from async_rl.config.rollout import RolloutSettings
from async_rl.config.sampler_checks import largest_group
from async_rl.config.teachers import TeacherSettings, teachers_of
from async_rl.errors import RunFailed
from async_rl.events import GeneratorRejoined, RecordEvent, ignore_event
from async_rl.generator.engine import Engine
from async_rl.generator.episodes import Episodes, Key
from async_rl.generator.facilities import Facilities
from async_rl.generator.forks import forks_for
from async_rl.generator.outbox import RESEND_S, BufferDeadline, Outbox
from async_rl.generator.pull import EngineWeights
from async_rl.generator.step_mark import StepMark
from async_rl.generator.task_code import LEFTOVER_S, TaskGuard
from async_rl.generator.task_pool import FarTask
from async_rl.generator.teachers import TeacherServers
from async_rl.stall_timer import StallTimer
from async_rl.task.protocol import Task
from async_rl.task.weigh import Weights
from async_rl.tidying import Tidying
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError
from async_rl.weights.canary import probe_tokens
from async_rl.wire import messages as msg
from async_rl.wire.channel import AsyncDealer
from async_rl.wire.frames import HARMLESS, portions
from async_rl.wire.heartbeat import Activity

if TYPE_CHECKING:
    from async_rl.generator.pull import WeightSource
    from async_rl.model.tokenizer import Tokenizer

FLUSH_S = 0.004
"""finished trajectories are gathered this long into one message"""
STATUS_S = 0.2
"""interval of the status sent to the buffer"""
JOINED_STATUS_S = 1.0
"""the same, of a generator that joined: there may be a thousand"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    """The settings that the loop of one generator needs. Example: `make_options(settings, "generator-0")`."""

    name: str
    max_sequences: int
    """most episodes at once"""
    group_size: int
    """most episodes of one permit"""
    max_turns: int
    """of one episode"""
    episode_timeout_s: float
    task_timeout_s: float = 0.0
    """of the task or its reward between two turns; 0: no limit"""
    save_turns_after_s: float
    """finished turns of episodes that have run longer are saved by the buffer"""
    timeout_s: float
    """longest silence of the buffer, and longest wait for it to acknowledge something"""
    stall_report_s: float
    """a longer wait for an acknowledgement is reported"""
    joined: bool = False
    """it joined a running run; the launcher did not start it"""
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """of the named parts of a reward"""
    task_slots: Mapping[str, int] = field(default_factory=dict)
    """places that the episodes share; they replace those of the task"""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    teachers: Mapping[str, TeacherSettings] = field(default_factory=dict)
    """whose log-probs the recipe distils"""


def make_options(settings: Settings, name: str, *, joined: bool = False) -> GeneratorOptions:
    """The options of generator `name`."""
    chosen = settings.generator
    return GeneratorOptions(
        name=name,
        max_sequences=chosen.max_sequences,
        group_size=largest_group(settings),
        max_turns=chosen.max_turns,
        episode_timeout_s=chosen.episode_timeout_s,
        task_timeout_s=task_limit_s(settings),
        save_turns_after_s=chosen.save_turns_after_s,
        timeout_s=settings.wire.timeout_s,
        stall_report_s=settings.wire.stall_report_s,
        joined=joined,
        reward_weights=settings.task.reward_weights,
        task_slots=chosen.task_slots,
        rollout=settings.rollout,
        teachers=teachers_of(settings.teachers),
    )


@dataclass(slots=True)
class PermitCredit:
    """How many permits the buffer may give, as a total since the last Hello, so that permits that are on their way
    are not counted twice."""

    received: int = 0
    """permits since the last Hello, as the buffer counts them"""
    limit: int = -1
    """highest total requested; -1: none yet"""

    def raise_limit(self, free: int) -> bool:
        """Request `free` permits beyond those received. False when so many are requested already."""
        if self.received + free <= self.limit:
            return False
        self.limit = self.received + free
        return True


@dataclass(slots=True)
class GeneratorLoop:
    """One generator on one event loop. `run` returns when the buffer says stop, or after `leave`."""

    options: GeneratorOptions
    engine: Engine
    task: Task
    tokenizer: Tokenizer
    dealer: AsyncDealer
    source: WeightSource
    activity: Activity = field(default_factory=Activity)
    """what the heartbeat reports"""
    buffer_silent_s: Callable[[], float] = lambda: 0.0
    record: RecordEvent = ignore_event
    """writes an event of the run"""
    on_stuck: Callable[[str], None] | None = None
    """ends this process, with the reason, because the task does not give the word back"""
    mark: StepMark | None = None
    """tells the launcher whose code runs"""

    guard: TaskGuard = field(init=False)
    facilities: Facilities = field(init=False)
    episodes: Episodes = field(init=False)
    outbox: Outbox = field(default_factory=Outbox)
    weights: EngineWeights = field(init=False)
    credit: PermitCredit = field(default_factory=PermitCredit)
    deadline: BufferDeadline = field(init=False)
    session: int = 0
    """of the last Hello"""
    sessions: set[int] = field(default_factory=set)
    """of every Hello of this process"""
    started: float = 0.0
    stopped: str = ""
    """why the buffer ended the run"""
    leaving: str = ""
    """why this generator is to end"""
    leave_now: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """an episode has ended, or has turns to save"""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    tidying: Tidying = field(default_factory=Tidying)

    def __post_init__(self) -> None:
        o = self.options
        self.deadline = BufferDeadline(
            o.name, o.timeout_s, StallTimer(o.stall_report_s), self.buffer_silent_s, self.record
        )
        self.weights = EngineWeights(o.name, self.engine, self.source)
        self.guard = TaskGuard(limit_s=o.task_timeout_s, on_stuck=self.on_stuck, mark=self.mark)
        self.facilities = Facilities(self.task, o.max_sequences, o.task_slots, self.mark)
        self.episodes = Episodes(
            task=self.task,
            engine=self.engine,
            tokenizer=self.tokenizer,
            generator=o.name,
            max_turns=o.max_turns,
            timeout_s=o.episode_timeout_s,
            save_turns_after_s=o.save_turns_after_s,
            on_finished=self.outbox.put,
            on_change=self.changed.set,
            guard=self.guard,
            weights=Weights(chosen=o.reward_weights),
            facilities=self.facilities,
            teachers=TeacherServers.of(o.teachers, o.name) if o.teachers else None,
            forks=forks_for(o.rollout, o.group_size),
            window=o.rollout.window,
        )

    async def run(self) -> None:
        """Generate until the buffer says stop. Raises RunFailed when the buffer is silent for too long or the engine
        dies."""
        self.started = time.monotonic()
        await self._say_hello()
        self.weights.probe = probe_tokens(self.task, self.tokenizer, self.engine.max_context)
        self.activity.now("setting up the task")
        await self.facilities.open(timeout_s=self.options.episode_timeout_s)
        self.activity.now("waiting for the trainer's first weights")
        await self._pull_weights()
        await self._request_permits()
        loops: list[Coroutine[Any, Any, None]] = [
            self._receive(),
            self._send(),
            self._swap_weights(),
            self._report(),
            self._await_leave(),
            self._await_failure(),
        ]
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            with self.guard.alarm():
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except asyncio.CancelledError:
            raise RunFailed(
                f"{self.options.name}: the task or its reward cancelled asyncio tasks that are not its own "
                "(asyncio.all_tasks); it may cancel those that it started"
            ) from None
        finally:
            for task in tasks:
                task.cancel()
            await self.episodes.cancel(timeout_s=LEFTOVER_S)
            ended, _ = await asyncio.wait(tasks, timeout=LEFTOVER_S)
            for task in ended:
                _ = task.cancelled() or task.exception()  # of several that failed the first is told
            if problem := await self.facilities.close():
                print(f"{self.options.name}: {problem}", file=sys.stderr)
            await self.engine.close()

    def leave(self, reason: str) -> None:
        """End soon: finished trajectories and turns are sent, unfinished episodes go to other generators. May be
        called in any thread."""
        self.leaving = reason
        self.loop.call_soon_threadsafe(self.leave_now.set)

    # ---------------------------------------------------------------- coroutines that run together

    async def _receive(self) -> None:
        """Handle the buffer's messages. Ends when it says stop."""
        while True:
            try:
                message = await self.dealer.receive()
            except WireError as error:
                raise RunFailed(f"{self.options.name} cannot read what the buffer sends: {error}") from None
            match message:
                case msg.Permits(session=self.session):
                    self._start_episodes(message)
                    await self._request_permits()
                case msg.Turns(trajectories=trajectories):
                    self.episodes.record_turns(trajectories)
                case msg.Unknown(session=self.session):
                    await self._rejoin()
                case msg.Accepted(pairs=pairs):
                    self.outbox.acknowledge(pairs)
                case msg.Abandon(groups=groups):
                    self.episodes.abandon(groups)
                case msg.NewWeights(version=version):
                    self.weights.announce(version)
                case msg.Stop(reason=reason):
                    self.stopped = reason or "it is done"
                    return
                case msg.Refused(session=session) if session and session not in self.sessions:
                    pass  # the process that had this name before is meant
                case msg.Refused(what=what, reason=reason, kind=kind, pairs=pairs):
                    if kind not in HARMLESS:
                        raise RunFailed(f"{self.options.name}: the buffer refused {what}: {reason}")
                    self.outbox.acknowledge(pairs)
                case _:
                    pass

    async def _send(self) -> None:
        """Send turns to save and finished trajectories, gathered for a moment, and request permits for their room."""
        while True:
            await self.changed.wait()
            await asyncio.sleep(FLUSH_S)
            self.changed.clear()
            await self._send_turns(self.episodes.take_unsent())
            await self._send_finished(self.outbox.take(time.monotonic()))
            await self._request_permits()

    async def _swap_weights(self) -> None:
        """Load newer weights whenever they are announced, while episodes go on."""
        while True:
            await self.weights.news.wait()
            self.weights.news.clear()
            while self.weights.behind:  # a stream may bring an older version than was announced last
                await self._pull_weights()  # the evidence leaves before any token sampled under a permit for it
                await self.dealer.send(msg.Holds(version=self.engine.version, session=self.session))

    async def _report(self) -> None:
        """Send the status at a steady pace, resend what is late, and check that the buffer lives."""
        self.activity.now("waiting for permits")
        self.activity.looping = True
        before = now = due = time.monotonic()
        while True:
            self.guard.look()
            self.guard.arm()
            self._update_activity()
            if now >= due:
                due = now + (JOINED_STATUS_S - STATUS_S / 2 if self.options.joined else 0.0)
                await self._send_status()
            await asyncio.sleep(STATUS_S)
            now = time.monotonic()
            if now - before > RESEND_S:  # stopped, or held up by a task: nothing could be received meanwhile
                self.outbox.excuse(now - before)
            before = now
            await self._send_finished(self.outbox.late(now))
            self.tidying.round(now)
            self.deadline.check(self.outbox, now)

    async def _await_leave(self) -> None:
        """Wait for `leave`, then send what is done and the message Leave. The end of this coroutine ends the loop."""
        await self.leave_now.wait()
        await self._send_turns(self.episodes.finished_turns())
        await self._send_finished(self.outbox.take(time.monotonic()))
        await self.dealer.send(msg.Leave(name=self.options.name, reason=self.leaving, session=self.session))

    async def _await_failure(self) -> None:
        """End this process when its engine dies. The episodes do not fail: other generators run them."""
        await self.episodes.failed.wait()
        assert self.episodes.failure is not None
        raise self.episodes.failure

    # ---------------------------------------------------------------- steps

    async def _say_hello(self) -> None:
        self.session = time.time_ns()
        self.sessions.add(self.session)
        await self.dealer.send(
            msg.Hello(
                role="generator",
                name=self.options.name,
                pid=os.getpid(),
                session=self.session,
                joined=self.options.joined,
            )
        )

    async def _rejoin(self) -> None:
        """Start again: the buffer gave this generator up (it was stopped, or cut off) and its permits to others.
        Finished trajectories stay in the outbox and are resent until they are acknowledged."""
        await self._send_turns(self.episodes.finished_turns())
        dropped = await self.episodes.cancel(timeout_s=RESEND_S)
        self.record(GeneratorRejoined(name=self.options.name, episodes_dropped=dropped))
        self.credit = PermitCredit()
        await self._say_hello()
        await self._request_permits()

    async def _request_permits(self) -> None:
        """Request as many permits as there is room for whole groups."""
        free = max(0, self.options.max_sequences - len(self.episodes.running)) // self.options.group_size
        if self.credit.raise_limit(free):
            limit, version = self.credit.limit, self.engine.version
            await self.dealer.send(msg.Want(limit=limit, version=version, session=self.session))

    def _start_episodes(self, message: msg.Permits) -> None:
        """Start the samples of new permits that are not in hand already."""
        self.credit.received = max(self.credit.received, message.granted)
        in_hand = self._in_hand()
        for permit in message.permits:
            self.episodes.start(permit, [s for s in permit.samples if (permit.group, s) not in in_hand])
        self._update_activity()

    def _in_hand(self) -> set[Key]:
        """(group, sample) of every episode that runs, waits for its group, or is finished and not acknowledged."""
        return {*self.episodes.in_hand, *self.outbox.pairs}

    async def _pull_weights(self) -> None:
        """Load newer weights and send evidence of what the engine holds then."""
        await self.weights.pull()
        await self.dealer.send(replace(await self.weights.evidence(), session=self.session))

    async def _send_turns(self, turns: tuple[Trajectory, ...]) -> None:
        for some in portions(turns):
            await self.dealer.send(msg.Turns(trajectories=some, session=self.session))

    async def _send_finished(self, trajectories: tuple[Trajectory, ...]) -> None:
        for some in portions(trajectories):
            await self.dealer.send(msg.Finished(trajectories=some, session=self.session))

    async def _send_status(self) -> None:
        stats = self.engine.stats()
        await self.dealer.send(
            msg.Status(
                name=self.options.name,
                session=self.session,
                version=self.engine.version,
                limit=max(0, self.credit.limit),
                groups=tuple({group for group, _ in self._in_hand()}),
                busy_seconds=stats.busy_seconds,
                wall_seconds=time.monotonic() - self.started,
                task_seconds=self.task.busy_seconds if isinstance(self.task, FarTask) else 0.0,
                tokens_generated=stats.tokens_generated,
                running=stats.running,
                waiting=stats.waiting,
            )
        )

    def _update_activity(self) -> None:
        """Set what the heartbeat reports that this process does."""
        running = self.engine.stats().running
        if self.weights.loading:
            kind, what = "loading", f"loading weights version {self.weights.announced}"
        elif running:
            kind, what = "decoding", f"decoding {running} sequences"
        elif busy := len(self.episodes.in_hand):
            kind, what = "in tasks", f"in tasks or rewards of {busy} episodes"
        else:
            kind, what = "waiting", "waiting for permits"
        same = self.activity.state()[0].startswith(kind)
        (self.activity.keepalive if same else self.activity.now)(what)
