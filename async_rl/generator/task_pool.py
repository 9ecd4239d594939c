"""The processes in which a generator runs the code of its task (`generator.task_processes`), its end of them.

An environment that computes for long, holds Python's lock, or crashes does so in a process of its own: decoding goes
on, and the generator lives. Each process runs many episodes at once, as the generator would; a new one goes to the
process that runs the fewest. One that ends takes its episodes with it: they fail with the reason, and another process
is started.

Who waits for whom: an episode waits for its process, as long as `generator.task_timeout_s` and
`generator.episode_timeout_s` allow; then it is given up, and the process killed when it does not let go of it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.generator.session import EpisodeAborted, EpisodeSession, TurnLimit
from async_rl.generator.task_process import OTHER
from async_rl.generator.task_wire import (
    READ_BYTES,
    Answer,
    Begin,
    Call,
    Cancel,
    Ended,
    FarError,
    Frame,
    Frames,
    Made,
    Ready,
    written,
)
from async_rl.task.protocol import Problem, Reward, Session, Task
from async_rl.trajectory import Split

UNHEARD = "unheard"
"""how an episode ended whose process was lost before it had called its session"""
LET_GO_S = 1.0
"""time a process has to let go of an episode that was given up"""
END_S = 2.0
"""time a process has to end"""
MOST_STARTS = 20
"""processes that may end before they are ready, one behind the other, before the generator gives up"""
LATER = ("generate", "score", "take_slot", "leave_slot")
"""calls that wait for the engine or for other episodes"""
AT_ONCE = (
    "append", "append_messages", "start_context", "resume_context", "openai", "reward_turn", "note", "note_turn",
    "note_tokens", "end_at_turn_limit", "end_at_token_limit",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Place:
    """An episode in a process."""

    session: EpisodeSession
    ended: asyncio.Future[Ended]
    heard: bool = False
    """whether it has called its session"""
    slots: list[tuple[str, AbstractAsyncContextManager[None]]] = field(default_factory=list)
    """that it holds, by name"""


@dataclass(slots=True, eq=False)
class Worker:
    """One process."""

    process: subprocess.Popen[bytes]
    link: socket.socket
    places: dict[int, Place] = field(default_factory=dict)
    ready: bool = False
    """takes episodes"""
    was_ready: bool = False
    error: str = ""
    """why it cannot run episodes"""
    unsent: bytearray = field(default_factory=bytearray)
    """what its socket did not take yet"""
    letting_go: int = 0
    """episodes that were given up and are not over"""
    at_engine: int = 0
    """episodes that wait for the policy"""
    busy_since: float = 0.0
    """since when an episode of it waits for the task's code and not for the policy; 0: none does"""
    busy_s: float = 0.0


@dataclass(slots=True, eq=False)
class TaskPool:
    """Processes that run episodes of one task.

    Args:
        name, args: of the task, as `make_task` takes them.
        count: processes.
    """

    name: str
    args: Mapping[str, Any]
    count: int
    workers: list[Worker] = field(default_factory=list)
    episodes: int = 0
    ended_busy_s: float = 0.0
    """of processes that have ended"""
    losses: int = 0
    """processes that ended before they were ready, since the last that was"""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """a process has become ready, or has ended"""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    closing: bool = False

    async def open(self) -> None:
        """Start the processes and wait until they are ready. Raises RunFailed when they cannot be."""
        for _ in range(self.count):
            self._start()
        while not all(worker.ready for worker in self.workers):
            await self._next_change()

    async def close(self) -> None:
        """End all processes."""
        self.closing = True
        for worker in self.workers:
            with suppress(OSError):
                worker.link.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + END_S
        for worker in self.workers:
            while worker.process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        for task in self.tasks:
            task.cancel()

    @property
    def busy_seconds(self) -> float:
        """Seconds in which the task's code had something to do, on average over the processes."""
        now = time.monotonic()
        open_s = sum(worker.busy_s + (now - worker.busy_since if worker.busy_since else 0.0) for worker in self.workers)
        return (self.ended_busy_s + open_s) / self.count

    async def play(self, problem: Problem, session: EpisodeSession, split: Split) -> Reward:
        """Run an episode in one of the processes. Raises FarError, TurnLimit, EpisodeAborted."""
        ended = await self._played(problem, session, split)
        if ended.raised == UNHEARD:  # another episode's end took it along before it had begun
            ended = await self._played(problem, session, split)
        if ended.teardown_error:
            session.note("teardown_error", ended.teardown_error)
        match ended.raised:
            case "":
                assert ended.reward is not None
                return ended.reward
            case "TurnLimit":
                raise TurnLimit(ended.text)
            case "EpisodeAborted":
                raise EpisodeAborted(ended.text)
        raise FarError(ended.text)

    async def _played(self, problem: Problem, session: EpisodeSession, split: Split) -> Ended:
        worker = await session.untimed(self._free())  # a process that is being started is not the task's time
        self.episodes += 1
        number = self.episodes
        place = worker.places[number] = Place(session, asyncio.get_running_loop().create_future())
        begin = Begin(episode=number, split=split, problem=problem.index, seed=session.seed, template=session.template)
        self._count(worker)
        try:
            self._send(worker, begin)
            return await asyncio.shield(place.ended)  # a cancellation is this episode's, not that of its end
        except asyncio.CancelledError:
            self._later(self._let_go(worker, number))
            raise
        finally:
            while place.slots:
                await place.slots.pop()[1].__aexit__(None, None, None)
            if place.ended.done():
                worker.places.pop(number, None)
                self._count(worker)

    # ------------------------------------------------------------------------------------------------ processes

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "async_rl.generator.task_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        ours.setblocking(False)
        worker = Worker(process, ours)
        self.workers.append(worker)
        self._later(self._serve(worker))

    async def _free(self) -> Worker:
        """The process that runs the fewest episodes."""
        while True:
            ready = [worker for worker in self.workers if worker.ready and not worker.letting_go]
            if ready:
                return min(ready, key=lambda worker: len(worker.places))
            await self._next_change()

    async def _next_change(self) -> None:
        """Wait until a process has become ready or ended. Raises RunFailed when they cannot be started."""
        errors = [worker.error for worker in self.workers if worker.error]
        if errors or self.losses > MOST_STARTS:
            why = errors[0] if errors else f"{self.losses} ended before they were ready"
            raise RunFailed(f"the task cannot run in processes of its own (generator.task_processes): {why}")
        await self.changed.wait()
        self.changed.clear()

    async def _serve(self, worker: Worker) -> None:
        """Receive what a process says until it is gone; start another one then."""
        loop, frames = asyncio.get_running_loop(), Frames()
        self._send(worker, Made(name=self.name, args=self.args))
        while True:
            try:
                data = await loop.sock_recv(worker.link, READ_BYTES)
            except OSError:
                data = b""
            if not data:
                break
            for frame in frames.feed(data):
                self._take(worker, frame)
        await self._lost(worker)

    async def _lost(self, worker: Worker) -> None:
        asyncio.get_running_loop().remove_writer(worker.link)
        worker.link.close()
        deadline = time.monotonic() + END_S
        while worker.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if worker.process.poll() is None:
            worker.process.kill()
        code = worker.process.wait()
        how = f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        self.losses += not worker.was_ready
        self.workers.remove(worker)
        if worker.busy_since:
            worker.busy_s += time.monotonic() - worker.busy_since
        self.ended_busy_s += worker.busy_s
        text = f"the process of the task that ran it {how} (generator.task_processes)"
        for number, place in worker.places.items():
            if not place.ended.done():
                raised = OTHER if place.heard else UNHEARD
                place.ended.set_result(Ended(episode=number, raised=raised, text=text))
        if worker.error:
            self.workers.append(worker)  # for `_next_change` to tell
        elif not self.closing:
            self._start()
        self.changed.set()

    async def _let_go(self, worker: Worker, number: int) -> None:
        """Make a process end an episode that was given up, or end the process."""
        worker.letting_go += 1
        self._send(worker, Cancel(episode=number))
        place = worker.places[number]
        await asyncio.wait({place.ended}, timeout=LET_GO_S)
        if not place.ended.done():
            worker.ready = False
            worker.process.kill()
        worker.letting_go -= 1
        worker.places.pop(number, None)
        self._count(worker)
        self.changed.set()

    def _send(self, worker: Worker, frame: Frame) -> None:
        worker.unsent += written(frame)
        self._flush(worker)

    def _flush(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # its end is noticed by who receives
            while worker.unsent:
                try:
                    del worker.unsent[: worker.link.send(worker.unsent)]
                except BlockingIOError:
                    loop.add_writer(worker.link, self._flush, worker)
                    return
            loop.remove_writer(worker.link)

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # ------------------------------------------------------------------------------------------------ calls

    def _take(self, worker: Worker, frame: Frame) -> None:
        match frame:
            case Ready(error=error):
                worker.ready = worker.was_ready = not error
                worker.error = error
                self.losses = 0
                self.changed.set()
            case Ended(episode=number) if number in worker.places:
                ended = worker.places[number].ended
                if not ended.done():
                    ended.set_result(frame)
            case Call(episode=number) if number in worker.places:
                place = worker.places[number]
                place.heard = True
                if frame.method in LATER:
                    self._later(self._answer_later(worker, place, frame))
                else:
                    self._send(worker, _answered(place, frame))
            case Call():
                aborted = Answer(number=frame.number, raised="EpisodeAborted", text="the episode is over")
                self._send(worker, aborted)

    async def _answer_later(self, worker: Worker, place: Place, call: Call) -> None:
        worker.at_engine += 1
        self._count(worker)
        try:
            value: Any = None
            if call.method == "generate":
                value = await place.session.generate(**call.named)
            elif call.method == "score":
                score = await place.session.score(*call.args)
                value = (score.log_probs, score.version)
            elif call.method == "take_slot":
                slot = place.session.slot(*call.args)
                await slot.__aenter__()
                place.slots.append((call.args[0], slot))
            else:
                held = next((one for one in place.slots if one[0] == call.args[0]), None)
                if held is not None:
                    place.slots.remove(held)
                    await held[1].__aexit__(None, None, None)
            answer = Answer(number=call.number, value=value)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            answer = Answer(number=call.number, raised=type(error).__name__, text=str(error))
        finally:
            worker.at_engine -= 1
            self._count(worker)
        self._send(worker, answer)

    def _count(self, worker: Worker) -> None:
        """Note whether the task's code has something to do in this process."""
        busy, now = len(worker.places) > worker.at_engine, time.monotonic()
        if busy and not worker.busy_since:
            worker.busy_since = now
        elif not busy and worker.busy_since:
            worker.busy_s += now - worker.busy_since
            worker.busy_since = 0.0


def _answered(place: Place, call: Call) -> Answer:
    try:
        return Answer(number=call.number, value=_at_once(place, call))
    except Exception as error:
        return Answer(number=call.number, raised=type(error).__name__, text=str(error))


def _at_once(place: Place, call: Call) -> Any:
    """What the session answers to a call that waits for nobody."""
    session = place.session
    if call.method in AT_ONCE:
        value = getattr(session, call.method)(*call.args, **call.named)
        return (value.base_url, value.api_key, value.model) if call.method == "openai" else value
    match call.method:
        case "turn" | "truncated" | "stopped":
            return getattr(session, call.method)
        case "said":
            return [(said.text, said.tokens, said.agent) for said in session.said]
    raise ValueError(f"a session has no {call.method}")


def in_processes(task: Task, settings: Settings) -> Task:
    """The task as a generator runs it: its episodes in processes of their own where the settings say so."""
    count = settings.generator.task_processes
    if not count:
        return task
    pool = TaskPool(name=settings.task.name, args=settings.task.args, count=count)
    return cast(Task, FarTask(task, pool))


class FarTask:
    """A task whose episodes run in a pool of processes; everything else is the task's own."""

    def __init__(self, task: Task, pool: TaskPool) -> None:
        self._task = task
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    async def setup(self) -> None:
        await self._pool.open()

    async def teardown(self) -> None:
        await self._pool.close()

    @property
    def busy_seconds(self) -> float:
        """Of its processes, on average."""
        return self._pool.busy_seconds

    async def setup_episode(self, problem: Problem, session: Session) -> None:
        """In the process."""

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        assert isinstance(session, EpisodeSession)
        return await self._pool.play(problem, session, session.split)
