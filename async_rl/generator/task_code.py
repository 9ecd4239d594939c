"""The code of a task and its reward, run so that it always comes to an end (`TaskGuard`): whatever it raises, however
long it takes, and whatever it changes in the process.

An asyncio task awaits the rollout's coroutine step by step. A step is a stretch of code without a wait: nothing else
runs in this event loop meanwhile. Before a step its begin is noted, so that an alarm can end one that does not come
back; after it, what it may have changed in the process is put back.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import CoroutineType, FrameType
from typing import Any, TypeVar

from msgspec import Struct

from async_rl.generator.process_state import KeptState
from async_rl.generator.shared_timer import SharedTimer
from async_rl.generator.step_mark import AT_ENGINE, EPISODE, Key, StepMark
from async_rl.process import Interrupted, Terminated, stacks_file
from async_rl.wire.heartbeat import locate, place_of

Result = TypeVar("Result")
ALARM_S = 1.0
"""seconds after which the alarm checks an event loop that stands still, and between two such checks"""
LEAST_S, LESS = 1.0, 4
"""each further time that a function holds up the process it gets a fourth of the time before, and at least so long"""
QUIET_S = 0.3
"""time for this process's own messages between two steps that hold it up"""
MOST_STOOD = 64
"""steps that held up the process that are remembered"""
MOST_RAISED = 5
"""times that a step may swallow TaskOverrun before the process ends"""
LEFTOVER_S = 0.5
"""longest time that cancelled asyncio tasks are waited for at the end"""


class TaskOverrun(BaseException):
    """The task or its reward took too long. No Exception: a grader that retries on every error must not go on."""


def is_ours(error: BaseException) -> bool:
    """Whether `error` is an order of a person or of the launcher, which no code of a task may swallow."""
    if isinstance(error, Interrupted | Terminated):
        return True
    if not isinstance(error, KeyboardInterrupt):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # asyncio's own handler of Ctrl-C, in a program that calls this library
    return trace is not None and trace.tb_frame.f_code.co_name == "_on_sigint"


def describe_error(error: BaseException) -> str:
    """Type, text, and where in the user's code it came from. Example:
    `KeyError: 'gold' (my_rewards.py:31 judge)`. Never raises."""
    try:
        text = str(error)
    except BaseException as other:
        text = f"its text cannot be had: {type(other).__name__}"
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    place = next((found for one in (*chain[1:], error) if (found := place_of(one.__traceback__))), "")
    return f"{type(error).__name__}{': ' * bool(text)}{text}{f' ({place})' * bool(place)}"


def reason_of(error: BaseException) -> str:
    """Why code of the task ended without a result: the text of an overrun, `describe_error` of anything else."""
    return str(error) if isinstance(error, TaskOverrun) else describe_error(error)


@dataclass(slots=True, kw_only=True, eq=False)
class TaskGuard:
    """Watches the steps of all episodes of one event loop.

    Example:
        guard = TaskGuard(limit_s=60.0)
        with guard.alarm():
            await guard.steps(task.rollout(problem, session))
    """

    limit_s: float = 0.0
    """longest time of a task or its reward between two turns; 0: no limit"""
    state: KeptState = field(default_factory=KeptState)
    since: float = 0.0
    """when the step began that runs now; 0: none runs. Monotonic clock"""
    overruns: Counter[str] = field(default_factory=Counter)
    """by place in the user's code: those known to take too long get less time"""
    quiet_until: float = 0.0
    """no step begins before: what this process has to send goes first"""
    on_stuck: Callable[[str], None] | None = None
    """ends this process, with the reason, when a step goes on whatever is raised in it"""
    mark: StepMark | None = None
    """tells others whose code runs, also when it ends this process"""
    stood: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MOST_STOOD))
    """(end, seconds) of the last steps that held up all episodes; monotonic clock"""
    raised: int = 0
    """times that the alarm ended the step that runs"""
    armed: bool = False
    timer: SharedTimer = field(default_factory=SharedTimer)
    """ends the waits for episodes"""
    sentinels: dict[int, tuple[int, int]] = field(default_factory=dict)
    """files that are kept open, a low and a high one, and what they are: code that closes what is not its own closes
    one of them, or puts another in its place"""
    pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        if self.on_stuck is not None:
            with tempfile.TemporaryFile() as unique:
                files = os.dup(unique.fileno()), stacks_file()
            self.sentinels = {file: _what(file) for file in files if file >= 0}

    def begin(self) -> None:
        """A step begins."""
        self.since = time.monotonic()
        self.raised = 0
        if self.mark is not None:
            self.mark.set()

    def end(self) -> None:
        """A step has ended: put back what it changed."""
        now = time.monotonic()
        if now - self.since > ALARM_S:
            self.stood.append((now, now - self.since))
        self.since = 0.0
        if os.getpid() != self.pid:
            os._exit(0)  # a child that the task forked came back here: it must not go on as this process
        if self.on_stuck is not None and not self._files_are_open():
            self.on_stuck("the task or its reward closed files of this process that are not its own")
        if self.mark is not None:
            self.mark.clear()
        if self.state.restore(now) and self.armed:
            self.arm()

    def look(self) -> None:
        """Between two steps: put back also what a step of a moment ago changed."""
        if self.state.restore() and self.armed:
            self.arm()

    def _files_are_open(self) -> bool:
        try:
            return all(_what(file) == what for file, what in self.sentinels.items())
        except OSError:
            return False

    def stood_s(self, last_s: float) -> float:
        """Seconds of the last `last_s` in which a step held up all episodes: they are nobody else's."""
        began = time.monotonic() - last_s
        return sum(max(0.0, end - max(end - took, began)) for end, took in self.stood)

    def wait_begins(self) -> Key | None:
        """A step has ended with a wait. Returns the episode whose code something else may run meanwhile (a thread),
        for `wait_ends`; None: it waits for the engine."""
        if self.mark is None or (key := EPISODE.get()) is None or key in AT_ENGINE:
            return None
        self.mark.hold(key)
        return key

    def wait_ends(self, key: Key) -> None:
        """What `wait_begins` began is over."""
        if self.mark is not None:
            self.mark.release(key)

    async def steps(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """What `coroutine` returns or raises."""
        return await Steps(self, coroutine)

    @contextmanager
    def alarm(self) -> Iterator[None]:
        """Inside, a step that holds up the event loop for too long ends with TaskOverrun, in whatever it does; so does
        a regular expression or a loop of Python, but not a single call into C. Main thread only; elsewhere nothing is
        watched."""
        if threading.current_thread() is not threading.main_thread() or not self.limit_s:
            yield
            return
        before = signal.signal(signal.SIGALRM, self._check)
        self.state.watch_signals()
        self.armed = True
        self.arm()
        try:
            yield
        finally:
            self.armed = False
            self.state.leave_signals()
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)

    def arm(self) -> None:
        """The event loop runs: the alarm counts from now on. Called all the time, also because a task may use the
        process's timer for its own purposes."""
        if self.armed:
            signal.setitimer(signal.ITIMER_REAL, ALARM_S, ALARM_S)

    def _check(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGALRM."""
        if not self.since:
            return
        took = time.monotonic() - self.since
        function = locate(frame).split()[-1]
        if took > max(LEAST_S, self.limit_s / LESS ** self.overruns[function]):
            self.overruns[function] += 1
            self.quiet_until = time.monotonic() + QUIET_S
            self.raised += 1
            why = (
                f"the task or its reward held up all episodes for {took:.0f} s {locate(frame)} "
                "(generator.task_timeout_s)"
            )
            if self.raised > MOST_RAISED and self.on_stuck is not None:
                self.on_stuck(f"{why} and went on when that was raised in it")
            raise TaskOverrun(why)


class Steps(Struct, eq=False):
    """An awaitable that runs a coroutine step by step. Cancelling it throws into the coroutine, as awaiting does."""

    guard: TaskGuard
    coroutine: Coroutine[Any, Any, Any]

    def __await__(self) -> Generator[Any, Any, Any]:
        guard, send, throw = self.guard, self.coroutine.send, self.coroutine.throw
        run: Callable[[Any], Any] = send
        given: Any = None
        while True:
            while guard.quiet_until and guard.quiet_until > time.monotonic():
                try:
                    yield
                except BaseException as error:
                    run, given = throw, error
                    break
            guard.begin()
            try:
                waits_for = run(given)
            except StopIteration as end:
                return end.value
            finally:
                guard.end()
            run = send
            waiting = None if guard.mark is None else guard.wait_begins()
            try:
                given = yield waits_for
            except GeneratorExit:
                self.coroutine.close()
                raise
            except BaseException as error:
                run, given = throw, error
            finally:
                if waiting is not None:
                    guard.wait_ends(waiting)


def _what(file: int) -> tuple[int, int]:
    """Device and number of an open file."""
    found = os.fstat(file)
    return found.st_dev, found.st_ino


def waits_in(coroutine: object) -> str:
    """Where a coroutine that waits stands, in words; empty where that is not known."""
    place = ""
    while isinstance(coroutine, CoroutineType):
        if coroutine.cr_frame is not None:
            place = place_of(coroutine.cr_frame) or place
        coroutine = coroutine.cr_await
    return place


def run_to_end(main: Coroutine[Any, Any, Result]) -> Result:
    """What `asyncio.run` does, except that code which ignores its cancellation, and threads that do not come back, are
    not waited for, that an interrupt leaves no other traceback than its own, and that nobody but `main` ends it: not
    what code of a task left running in the event loop, nor its `stop`."""
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        result = _run(loop, loop.create_task(main))
    except BaseException:
        loop.set_exception_handler(lambda *_: None)
        raise
    else:
        return result
    finally:
        with suppress(RuntimeError):  # the loop was closed by what it ran
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=LEFTOVER_S))
            for task in left:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        with suppress(RuntimeError):
            _close(loop)


def _run(loop: asyncio.AbstractEventLoop, main: asyncio.Task[Result]) -> Result:
    told = set[str]()
    while True:
        try:
            return loop.run_until_complete(main)
        except (SystemExit, KeyboardInterrupt, RuntimeError) as error:
            if main.done() or loop.is_closed() or is_ours(error):
                raise
            # the event loop was stopped, or something in it raised what asyncio lets through: it goes on
            said = (
                "stopped the event loop" if isinstance(error, RuntimeError) else f"raised {describe_error(error)} in it"
            )
            if said not in told:
                told.add(said)
                with suppress(OSError, ValueError):  # a closed stream
                    print(f"the task or its reward {said}; the event loop goes on", file=sys.stderr)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    executor = getattr(loop, "_default_executor", None)
    if executor is not None:
        executor.shutdown(wait=False, cancel_futures=True)
        loop._default_executor = None  # type: ignore[attr-defined]
    loop.close()
