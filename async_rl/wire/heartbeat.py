"""Pulses from a thread of its own (`Heartbeat`), so that a busy process is not taken for dead.

The main thread notes what it does (`Activity`, two assignments). The thread sends that to the launcher through a pipe
and to the buffer through a socket. Torch releases Python's lock while it computes, so the thread runs then, too; in a
stopped process nothing runs.
"""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

from async_rl.config import WireSettings
from async_rl.process_spec import NO_PIPE
from async_rl.trajectory.codec import WireError
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, WireTimeout
from async_rl.wire.keys import keys_in

PULSE_S = 1.0
"""seconds between two pulses"""
LONGEST_DOING = 400
"""characters of what a process does; so a line on the pipe stays whole (PIPE_BUF)"""
STARTING = "starting"
OVERDUE_S = 1.0
"""a main loop that has called neither `now` nor `keepalive` for so long is held up by something"""
_FOREIGN = tuple(
    str(path)
    for name in ("stdlib", "purelib", "platlib")
    for path in (Path(sysconfig.get_path(name)), Path(sysconfig.get_path(name)).resolve())
)
_OURS = str(Path(__file__).parent.parent)


class Activity:
    """What the main thread does, and since when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._state = (STARTING, clock())
        self._round = clock()
        self.looping = False
        """the main thread is a loop that calls `now` or `keepalive` all the time: when it does not, it is held up"""
        self.woken = threading.Event()
        """the next pulse is sent at once"""

    def now(self, doing: str) -> None:
        """The main thread begins to do this."""
        starts, self._round = self._state[0] == STARTING, self._clock()
        self._state = (doing, self._round)
        if starts:  # a process that starts may be silent for longer: the launcher must hear at once when it has
            self.woken.set()

    def keepalive(self, doing: str) -> None:
        """The main thread goes on with what it does, described in these words now."""
        self._round = self._clock()
        self._state = (doing, self._state[1])

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Inside the block it does this, after it what it did before."""
        before = self._state
        self.now(doing)
        try:
            yield
        finally:
            self._round = self._clock()
            self._state = before

    def state(self) -> tuple[str, float]:
        """(what it does, for how many seconds)."""
        doing, since = self._state
        return doing, self._clock() - since

    def held_up_s(self) -> float:
        """Seconds since the main loop last showed that it runs; 0 when it does run, or there is none."""
        late = self._clock() - self._round
        return late if self.looping and late > OVERDUE_S else 0.0


class Heartbeat:
    """The thread that sends pulses. `dealer` opens its socket to the buffer (in the thread, which owns it); None: no
    buffer. `pipe` and `agent`: see `make_heartbeat`."""

    def __init__(
        self,
        *,
        name: str,
        role: str,
        activity: Activity,
        dealer: Callable[[], Dealer] | None,
        every_s: float = PULSE_S,
        pipe: int = NO_PIPE,
        agent: int = 0,
        group: Callable[[], int] = lambda: -1,
        host: str = "",
        on_lost: Callable[[str], None] | None = None,
        lost_after_s: float = 0.0,
    ) -> None:
        self._group, self._host, self._on_lost, self._lost_after_s = group, host, on_lost, lost_after_s
        self._answered = False
        self._name, self._role, self._activity = name, role, activity
        self._every_s = every_s
        self._open = dealer
        self._pipe, self._of = pipe, agent
        self._watched = threading.get_ident()
        self._ended = False
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        """Start the thread. Call it in the main thread, which is the one that is watched."""
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended = True
        self._activity.woken.set()
        self._thread.join(2 * PULSE_S)

    @property
    def buffer_silent_s(self) -> float:
        """Seconds since the buffer answered last; without meaning when there is no socket to it."""
        return time.monotonic() - self._heard

    def _run(self) -> None:
        dealer = self._open() if self._open is not None else None
        try:
            before = time.monotonic()
            while True:
                pulse = self._pulse()
                self._send_to_launcher(pulse)
                if dealer is not None:
                    dealer.send(pulse)
                    self._receive(dealer)
                    if self._on_lost is not None and self._answered and self.buffer_silent_s > self._lost_after_s:
                        self._on_lost(
                            f"has not answered for {self.buffer_silent_s:.0f} s (wire.timeout_s="
                            f"{self._lost_after_s:g}): the run has ended, or cannot be reached from here"
                        )
                self._activity.woken.wait(self._every_s)
                self._activity.woken.clear()
                if self._ended:
                    return
                now = time.monotonic()
                if now - before > 4 * self._every_s:  # this process was stopped: it could receive nothing
                    self._heard = now
                before = now
        finally:
            if dealer is not None:
                dealer.close(linger_s=0)

    def _receive(self, dealer: Dealer) -> None:
        """Take in the buffer's answers."""
        while True:
            try:
                message = dealer.receive(0.0, "the buffer's answer to a pulse")
            except WireTimeout:
                return
            except WireError:
                continue
            self._heard, self._answered = time.monotonic(), True
            if isinstance(message, msg.Stop) and self._on_lost is not None:
                self._on_lost(f"has ended: {message.reason}")

    def _pulse(self) -> msg.Pulse:
        doing, seconds = self._activity.state()
        if held_up := self._activity.held_up_s():
            doing += f"; held up for {held_up:.1f} s {locate(sys._current_frames().get(self._watched))}"
        return msg.Pulse(
            name=self._name,
            pid=os.getpid(),
            role=self._role,
            doing=doing[:LONGEST_DOING],
            since_s=seconds,
            group=self._group(),
            host=self._host,
        )

    def _send_to_launcher(self, pulse: msg.Pulse) -> None:
        if self._pipe == NO_PIPE:
            return
        line = {"name": pulse.name, "pid": pulse.pid, "doing": pulse.doing, "since_s": round(pulse.since_s, 3)}
        if self._of:
            line["of"] = self._of
        with suppress(BlockingIOError, BrokenPipeError):  # the launcher is busy or gone: others find that out
            os.write(self._pipe, json.dumps(line).encode() + b"\n")


def make_heartbeat(
    name: str,
    role: str,
    activity: Activity,
    wire: WireSettings,
    endpoint: str | None,
    *,
    identity: str = "",
    pipe: int = NO_PIPE,
    agent: int = 0,
    group: Callable[[], int] = lambda: -1,
    host: str = "",
    on_lost: Callable[[str], None] | None = None,
) -> Heartbeat:
    """The heartbeat of a process of a run. `endpoint`: where the buffer listens; None: pulses go to the launcher
    alone. `identity`: of its socket, where that is not the name. `pipe`: file descriptor to the launcher; `agent`:
    process number of what started this rank of the trainer (see process_spec.py). `group`: whose code of the task it
    runs now. `host`: name of this machine, for one that somebody else started; `on_lost`: called in the heartbeat's
    thread, in words, when the buffer says over this socket that it ends, or has not answered for wire.timeout_s."""

    def dealer() -> Dealer:
        assert endpoint is not None
        limit = wire.max_message_mb << 20
        return Dealer(endpoint, f"{identity or name}{msg.PULSE}", max_message_bytes=limit, keys=keys_in(wire.keys))

    # several pulses must fit into the silence after which a process is taken for frozen
    every_s = min(PULSE_S, wire.frozen_after_s / 4)
    chosen = dealer if endpoint is not None else None
    return Heartbeat(
        name=name,
        role=role,
        activity=activity,
        dealer=chosen,
        every_s=every_s,
        pipe=pipe,
        agent=agent,
        group=group,
        host=host,
        on_lost=on_lost,
        lost_after_s=wire.timeout_s,
    )


def place_of(at: FrameType | TracebackType | None) -> str:
    """The innermost place in code that is neither a library's nor ours (a user's reward or task), as `my_rewards.py:31
    judge`; empty where there is none. `at`: where a thread is, or the traceback of an error."""
    found = ""
    while isinstance(at, TracebackType):
        found = in_user_code(at.tb_frame.f_code.co_filename, at.tb_lineno, at.tb_frame.f_code.co_name) or found
        at = at.tb_next
    while at is not None and not found:
        found = in_user_code(at.f_code.co_filename, at.f_lineno, at.f_code.co_name)
        at = at.f_back
    return found


def place_in_dump(text: str, first: Collection[int] = ()) -> str:
    """The innermost place in user code of a dump of faulthandler: of the threads `first`, else of the main thread,
    which it has last, else of another; without any, where the main thread is."""
    found = threads_in_dump(text)
    threads = [*(found[thread] for thread in first if thread in found), *list(found.values())[::-1]]
    user = (in_user_code(*frame) for thread in threads for frame in thread)
    return next(filter(None, user), "") or next((_named(*frame) for thread in threads[:1] for frame in thread), "")


def threads_in_dump(text: str) -> dict[int, list[tuple[str, int, str]]]:
    """Thread -> its (file, line, function), the innermost first, of a dump of faulthandler."""
    _, *pieces = _THREAD.split(text)  # of each thread its number and its lines
    numbers, blocks = (int(number, 16) for number in pieces[::2]), pieces[1::2]
    return {
        number: [(file, int(line), name) for file, line, name in _DUMPED.findall(block)]
        for number, block in zip(numbers, blocks, strict=True)
    }


def is_ours(file: str) -> bool:
    """Whether a file is of this package, and not of its tasks, which run as a user's do."""
    return file.startswith(_OURS) and not file.startswith(f"{_OURS}/task/")


_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+).*$", re.MULTILINE)
_DUMPED = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


def in_user_code(file: str, line: int, name: str) -> str:
    """`my_rewards.py:31 judge`; empty where the file is a library's or ours."""
    return "" if file.startswith((_OURS, *_FOREIGN, "<")) else _named(file, line, name)


def _named(file: str, line: int, name: str) -> str:
    return f"{Path(file).name}:{line} {name}"


def locate(frame: FrameType | None) -> str:
    """Where a thread is, in words: in the innermost code that is neither a library's nor ours (a user's reward or
    task), else in ours. Example: `in my_rewards.py:31 judge`."""
    ours = ""
    while frame is not None:
        file = frame.f_code.co_filename
        here = f"in {Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
        if file.startswith(_OURS):
            ours = ours or here
        elif not file.startswith((*_FOREIGN, "<")):
            return here
        frame = frame.f_back
    return ours or "in a library"
