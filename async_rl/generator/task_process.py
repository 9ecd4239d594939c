"""A process that runs the code of a task for a generator (`generator.task_processes`): environments and rewards.

Its episodes see a session like any other; every call of it travels to the generator and back (task_pool.py is that
end). What a call must answer at once (`append`, `truncated`) is waited for; meanwhile this process does nothing else.

Who waits for whom: this process waits for the generator, and ends when that is gone.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

from msgspec.structs import replace

from async_rl.generator.session import EpisodeAborted, TurnLimit
from async_rl.generator.task_code import describe_error
from async_rl.generator.task_wire import (
    Answer,
    Begin,
    Call,
    Cancel,
    Ended,
    Frame,
    Frames,
    Made,
    Ready,
    receive,
    written,
)
from async_rl.task import Task, make_task
from async_rl.task.protocol import Connection, Reward, Score, Session, Utterance
from async_rl.trajectory import Split

RAISED: Mapping[str, type[Exception]] = {
    kind.__name__: kind for kind in (TurnLimit, EpisodeAborted, ValueError, RuntimeError)
}
"""what a session raises, by name"""
OTHER = "other"
"""name of what anything else raised"""
TEAR_DOWN_S = 10.0
"""longest time of `Task.teardown_episode`"""


@dataclass(slots=True, eq=False)
class Link:
    """The socket to the generator."""

    socket: socket.socket
    frames: Frames = field(default_factory=Frames)
    calls: int = 0
    answers: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    """calls that wait for their answer without blocking"""
    unread: list[Begin | Cancel] = field(default_factory=list)
    """what came and is not begun"""
    wake: Callable[[], None] = lambda: None
    """there is something unread"""

    def send(self, frame: Frame) -> None:
        self.socket.sendall(written(frame))

    def ask(self, episode: int, method: str, *args: Any, **named: Any) -> Any:
        """Call the session and wait for its answer, blocking."""
        self.calls += 1
        number = self.calls
        self.send(Call(episode=episode, number=number, method=method, args=args, named=named))
        found: list[Answer] = []
        while not found:
            for frame in receive(self.socket, self.frames):
                if isinstance(frame, Answer) and frame.number == number:
                    found.append(frame)
                else:
                    self.take(frame)
        return _value(found[0])

    async def ask_later(self, episode: int, method: str, *args: Any, **named: Any) -> Any:
        """Call the session and wait for its answer, other episodes go on meanwhile."""
        self.calls += 1
        number = self.calls
        future = self.answers[number] = asyncio.get_running_loop().create_future()
        try:
            self.send(Call(episode=episode, number=number, method=method, args=args, named=named))
            return _value(await future)
        finally:
            self.answers.pop(number, None)

    def take(self, frame: Frame) -> None:
        """Keep what came for later."""
        match frame:
            case Answer(number=number):
                future = self.answers.pop(number, None)
                if future is not None and not future.done():
                    future.set_result(frame)
            case Begin() | Cancel():
                self.unread.append(frame)
                asyncio.get_running_loop().call_soon(self.wake)


def _value(answer: Answer) -> Any:
    """What the session answered. Raises what it raised."""
    if answer.raised:
        raise RAISED.get(answer.raised, RuntimeError)(answer.text)
    return answer.value


@dataclass(slots=True, eq=False)
class FarSession:
    """Implements `task.Session` for an episode that a generator samples."""

    link: Link
    episode: int
    split: Split
    seed: int
    template: str

    def _ask(self, method: str, *args: Any, **named: Any) -> Any:
        return self.link.ask(self.episode, method, *args, **named)

    @property
    def turn(self) -> int:
        return int(self._ask("turn"))

    @property
    def truncated(self) -> bool:
        return bool(self._ask("truncated"))

    @property
    def stopped(self) -> bool:
        return bool(self._ask("stopped"))

    @property
    def said(self) -> Sequence[Utterance]:
        return [Utterance(text=text, tokens=tuple(tokens), agent=agent) for text, tokens, agent in self._ask("said")]

    async def generate(
        self,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        state_key: int = -1,
        temperature: float | None = None,
        stop_tokens: Sequence[int] = (),
        agent: str = "",
    ) -> str:
        text = await self.link.ask_later(
            self.episode,
            "generate",
            max_tokens=int(max_tokens),
            stop=list(stop),
            state_key=int(state_key),
            temperature=None if temperature is None else float(temperature),
            stop_tokens=[int(token) for token in stop_tokens],
            agent=agent,
        )
        return str(text)

    def append(self, text: str) -> None:
        self._ask("append", text)

    def append_messages(self, messages: Sequence[Mapping[str, Any]], *, as_sampled: bool = False) -> None:
        self._ask("append_messages", list(messages), as_sampled=as_sampled)

    def start_context(self, prompt: str | Sequence[Mapping[str, Any]]) -> int:
        return int(self._ask("start_context", prompt if isinstance(prompt, str) else list(prompt)))

    def resume_context(self, number: int) -> None:
        self._ask("resume_context", int(number))

    async def score(self, text: str) -> Score:
        log_probs, version = await self.link.ask_later(self.episode, "score", text)
        return Score(log_probs=tuple(log_probs), version=int(version))

    def openai(self, *, max_tokens: int | None = None) -> Connection:
        base_url, api_key, model = self._ask("openai", max_tokens=max_tokens)
        return Connection(base_url=base_url, api_key=api_key, model=model)

    @asynccontextmanager
    async def slot(self, name: str) -> AsyncIterator[None]:
        await self.link.ask_later(self.episode, "take_slot", name)
        try:
            yield
        finally:
            await self.link.ask_later(self.episode, "leave_slot", name)

    def reward_turn(self, value: float, *, agent: str | None = None) -> None:
        self._ask("reward_turn", float(value), agent=agent)

    def end_at_turn_limit(self) -> None:
        self._ask("end_at_turn_limit")

    def end_at_token_limit(self) -> None:
        self._ask("end_at_token_limit")

    def note(self, key: str, value: float | str) -> None:
        self._ask("note", key, value if isinstance(value, str) else float(value))

    def note_turn(self, key: str, value: float, *, agent: str | None = None) -> None:
        self._ask("note_turn", key, float(value), agent=agent)

    def note_tokens(self, key: str, values: Sequence[float], *, agent: str | None = None) -> None:
        self._ask("note_tokens", key, [float(value) for value in values], agent=agent)

    def keep(self, value: Any) -> None:
        raise RuntimeError("nothing can be kept where episodes run in processes (generator.task_processes)")


@dataclass(slots=True, eq=False)
class TaskProcess:
    """The episodes of this process."""

    link: Link
    task: Task
    running: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self) -> None:
        """Run episodes until the generator is gone."""
        loop = asyncio.get_running_loop()
        self.link.wake = self._begin_unread
        loop.add_reader(self.link.socket.fileno(), self._readable)
        await self.over.wait()

    def _readable(self) -> None:
        try:
            for frame in receive(self.link.socket, self.link.frames, socket.MSG_DONTWAIT):
                self.link.take(frame)
        except BlockingIOError:
            return  # an episode that waited for its answer has read it
        except (EOFError, OSError):
            self.over.set()

    def _begin_unread(self) -> None:
        """Begin and cancel what came."""
        while self.link.unread:
            frame = self.link.unread.pop(0)
            if isinstance(frame, Begin):
                self.running[frame.episode] = asyncio.ensure_future(self._run(frame))
            elif frame.episode in self.running:
                self.running[frame.episode].cancel()

    async def _run(self, begin: Begin) -> None:
        session = FarSession(
            self.link, begin.episode, cast(Split, begin.split), seed=begin.seed, template=begin.template
        )
        ended = await self._played(begin, session)
        self.running.pop(begin.episode, None)
        try:
            self.link.send(ended)
        except (TypeError, OverflowError) as error:  # a reward that is no number, which no frame can carry
            text = f"the reward cannot be sent: {error}"
            self.link.send(Ended(episode=begin.episode, raised=OTHER, text=text))

    async def _played(self, begin: Begin, session: FarSession) -> Ended:
        problem = None
        try:
            problem = self.task.problems(session.split)[begin.problem]
            await self.task.setup_episode(problem, cast(Session, session))
            reward: Reward = await self.task.rollout(problem, cast(Session, session))
            ended = Ended(episode=begin.episode, reward=_plain(reward))
        except (TurnLimit, EpisodeAborted) as error:
            ended = Ended(episode=begin.episode, raised=type(error).__name__, text=str(error))
        except BaseException as error:
            ended = Ended(episode=begin.episode, raised=OTHER, text=describe_error(error))
        if problem is not None:
            try:
                await asyncio.wait_for(self.task.teardown_episode(problem, cast(Session, session)), TEAR_DOWN_S)
            except BaseException as error:
                ended = replace(ended, teardown_error=describe_error(error))
        return ended


def _plain(reward: Reward) -> float | dict[str, float | None]:
    """A reward as plain numbers; anything else stays as it is, for the generator to judge."""
    if isinstance(reward, Mapping):
        return {str(name): None if value is None else float(value) for name, value in reward.items()}
    return float(reward)


async def work(link: Link) -> None:
    """Make the task and run its episodes until the generator is gone."""
    made: Made | None = None
    while made is None:
        for frame in receive(link.socket, link.frames):
            if isinstance(frame, Made):
                made = frame
    try:
        task = make_task(made.name, made.args)
        await task.setup()
    except BaseException as error:
        link.send(Ready(error=describe_error(error)))
        return
    link.send(Ready())
    try:
        await TaskProcess(link, task).serve()
    finally:
        with suppress(Exception):
            await asyncio.wait_for(task.teardown(), TEAR_DOWN_S)


def main() -> None:
    """Serve the socket whose number is the last argument; ends this process."""
    with socket.socket(fileno=int(sys.argv[-1])) as given, suppress(EOFError, OSError, KeyboardInterrupt):
        asyncio.run(work(Link(given)))
    sys.stdout.flush()
    os._exit(0)  # whatever threads the task has left running


if __name__ == "__main__":
    main()
