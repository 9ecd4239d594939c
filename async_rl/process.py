"""What every process of a run does at its ends: start, orders to stop, death of the launcher, failure."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from async_rl.errors import RunFailed, UserError
from async_rl.events import ProcessFailed
from async_rl.run_folder import RunFolder

# -------------------- interrupt
# Ctrl-C, an order to end, a closed terminal: the three ways a person stops a command.
#
# The first of them raises `Interrupted` wherever the command is; from then on further ones are ignored, so
# that cleaning up is never cut short. Imports nothing heavy: it must act while everything else is imported.

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The command was told to end; the message is the signal's name. Not an Exception: code that guards
    itself against whatever a user's function raises must not swallow it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the signals raise Interrupted (once); handlers are put back behind it. Inside another one, or
    in another thread than the main one, it changes nothing."""
    nested = signal.getsignal(signal.SIGINT) in (_interrupt, _nothing)
    if nested or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for s in SIGNALS:
        if s == signal.SIGHUP and signal.getsignal(s) == signal.SIG_IGN:
            continue  # nohup: the command shall outlive its terminal
        before[s] = signal.signal(s, _interrupt)
    try:
        yield
    finally:
        for s, handler in before.items():
            if signal.getsignal(s) != signal.SIG_IGN:  # else it is to stay so
                signal.signal(s, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, a signal waits: it raises Interrupted behind it. For what is short and must not be left half done."""
    waiting: list[int] = []
    held = [s for s in SIGNALS if signal.getsignal(s) == _interrupt]
    if threading.current_thread() is not threading.main_thread():
        held = []
    for s in held:
        signal.signal(s, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for s in held:
            signal.signal(s, _interrupt)
        if waiting:
            _interrupt(waiting[0], None)


def ignore_interrupts(*, to_the_end: bool = False) -> None:
    """From here on the signals do nothing; `to_the_end`: of the interpreter, which takes a moment, too."""
    if threading.current_thread() is threading.main_thread():
        for s in SIGNALS:
            # Not SIG_IGN at once: Python writes a traceback when a signal came just before it was set. But
            # the interpreter takes its own handlers away while it ends.
            signal.signal(s, signal.SIG_IGN if to_the_end else _nothing)


def _nothing(number: int, _: FrameType | None) -> None:
    pass


def _interrupt(number: int, _: FrameType | None) -> None:
    ignore_interrupts()
    raise Interrupted(signal.Signals(number).name)


# -------------------- rank name
# What the processes of the trainer's ranks are called. Does not import torch.

RANK = "RANK"
"""environment variable: torchrun's number of a process, 0 for the one that leads"""
MISSED = "did not get"
"""in the words of a rank that another one failed: not the cause"""


def process_name(rank: int) -> str:
    """In logs and messages. Rank 0 is what the run knows as its trainer."""
    return "trainer" if rank == 0 else f"trainer-rank-{rank}"


PARENT_PIPE = "ASYNC_RL_PARENT_PIPE"
"""environment variable: file descriptor that closes when the launcher dies"""
CAUSE_PIPE = "ASYNC_RL_CAUSE_PIPE"
"""environment variable: file descriptor that takes the cause of a bad end, also when no file can be written"""
MOST_CAUSE = 5000
"""characters of a cause; as JSON it fits a pipe"""
TOLD_TO_END = 143
"""exit code after SIGTERM"""
AGENT = "ASYNC_RL_AGENT"
"""environment variable of the trainer's ranks: process number of what started them (launch/agent.py)"""
CORES = "ASYNC_RL_CORES"
"""environment variable: the cores of a process (0,1), of several ranks one after the other (0,1;2,3)"""
OUT_OF_MEMORY = (
    "OutOfMemoryError", "MemoryError", "can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc",
    "memory ran out", "CUBLAS_STATUS_ALLOC_FAILED", "No available memory for the cache blocks",
)  # fmt: skip
GRACE_S = 1.0
"""time a process has to clean up after being told to end; what it leaves then, the launcher removes"""


def run_process(name: str, folder: RunFolder, work: Callable[[], None], *, from_outside: bool = False) -> NoReturn:
    """Run `work` as process `name`, leave the reason of a bad end in the run folder, and exit. `from_outside`: a
    user started it, who is told the reason and may end it by Ctrl-C."""
    # the launcher decides what Ctrl-C means
    signal.signal(signal.SIGINT, _stop if from_outside else signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    _die_with_parent()
    bind_threads()
    try:
        work()
    except SystemExit as order:
        _exit(int(order.code or 0))
    except (UserError, RunFailed) as error:
        if from_outside:
            print(f"async-rl: {name}: {error}", file=sys.stderr)
        _leave(name, folder, "user" if isinstance(error, UserError) else "run", str(error))
    except OSError as error:  # most of them: a full disk
        if error.errno == errno.ENOMEM:
            _leave(name, folder, "memory", str(error))
        _leave(name, folder, "run", f"{error}; is its disk full or read-only? Then make room and resume the run")
    except Exception as error:  # a process boundary: reported, and it ends the run
        with suppress(OSError):
            traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
        _leave(name, folder, "memory" if speaks_of_memory(said) else "run", said)
    _exit(0)


def speaks_of_memory(text: str) -> bool:
    """Whether an error's words say that an allocation failed: torch's on a CPU and on a GPU, C++'s, vLLM's."""
    return any(words in text for words in OUT_OF_MEMORY)


def bind_threads() -> None:
    """Keep to the cores this process was given, if it was given any; threads begun later keep to them, too."""
    each = [part for part in os.environ.get(CORES, "").split(";") if part]
    if each:
        mine = each[int(os.environ.get("LOCAL_RANK", "0")) % len(each)]
        os.sched_setaffinity(0, {int(core) for core in mine.split(",")})


def _leave(name: str, folder: RunFolder, kind: str, message: str) -> NoReturn:
    cause = json.dumps({"kind": kind, "message": message[:MOST_CAUSE], "time": time.time()})
    with suppress(OSError, KeyError):  # first where no disk is needed
        os.write(int(os.environ[CAUSE_PIPE]), cause.encode() + b"\n")
    with suppress(OSError):
        folder.failure(name).write_text(cause)
    with suppress(RunFailed):
        folder.record(ProcessFailed(process=name, message=message))
    _exit(2 if kind == "user" else 1)


def _exit(code: int) -> NoReturn:
    """End now: nothing is left to clean up, and threads of libraries need not be waited for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def on_order_to_end(leave: Callable[[], None]) -> None:
    """From now on SIGTERM calls `leave`, which has `GRACE_S` to end the process. Main thread only."""

    def ordered(*_: object) -> None:
        _end_within_grace()
        leave()

    signal.signal(signal.SIGTERM, ordered)


def belong_to_agent(pipes: Sequence[str]) -> None:
    """Of a rank that torch's elastic agent started: end when the agent ends, and hold the launcher's `pipes`
    (environment variables), which that agent holds but does not pass on."""
    agent = int(os.environ[AGENT])
    die_with(agent)
    for name in pipes:
        end = os.environ.pop(name, None)
        if end is None:
            continue
        with suppress(OSError):
            # Not to wait for the other end, should that have gone: reading then says so at once.
            mode = os.O_RDONLY if name == PARENT_PIPE else os.O_WRONLY
            own = os.open(f"/proc/{agent}/fd/{end}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
            if name == PARENT_PIPE:
                os.set_blocking(own, True)
            os.environ[name] = str(own)


def die_with(pid: int, grace_s: float = 0.0) -> None:
    """From now on this process ends as soon as process `pid` does, however that ends; with `grace_s` it is told to,
    and gets so long to clean up."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(TOLD_TO_END)

    def watch() -> None:
        select.select([watched], [], [])
        if grace_s:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(grace_s)
        os._exit(TOLD_TO_END)

    threading.Thread(target=watch, name="agent-watch", daemon=True).start()


def _stop(*_: object) -> NoReturn:
    """Clean up and end."""
    _end_within_grace()
    raise SystemExit(TOLD_TO_END)


def _end_within_grace() -> None:
    """A thread that waits for something must not hold the end up."""
    timer = threading.Timer(GRACE_S, os._exit, (TOLD_TO_END,))
    timer.daemon = True
    timer.start()


def _die_with_parent() -> None:
    """No orphans: the launcher holds the other end of a pipe; when it is gone, so are we."""
    descriptor = os.environ.get(PARENT_PIPE)
    if descriptor is None:
        return

    def watch() -> None:
        while os.read(int(descriptor), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread removes what it has made
        time.sleep(2 * GRACE_S)
        os._exit(TOLD_TO_END)  # it is in the middle of something that cannot be interrupted

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
