"""Signals, and how the processes of a run begin and end.

Two kinds of process stand behind this file:

- **A command** (`async-rl run`) is ended by a person: Ctrl-C, SIGTERM, or a closed terminal. Inside `interruptible`
  the first of these signals raises `Interrupted` wherever the command is; from then on further ones are ignored, so
  that cleaning up is never cut short.
- **A child** (buffer, trainer, generator, ...) runs its work inside `run_process`. Ctrl-C does not reach it, since the
  launcher decides what Ctrl-C means. It ends on SIGTERM, and when the launcher is gone, which closes a pipe. When its
  work fails, it leaves the cause in a second pipe and in the run folder, where the launcher finds it.

Imports nothing heavy: signals must be handled while everything else is imported.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import BinaryIO, NoReturn

from async_rl.errors import RunFailed, UserError
from async_rl.events import ProcessFailed
from async_rl.process_spec import NO_PIPE, Pipes, ProcessSpec
from async_rl.run_folder import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""by which a person or a scheduler ends a command"""
TOLD_TO_END = 143
"""exit code after SIGTERM"""
STACKS_SIGNAL = signal.SIGUSR2
"""on which a child writes the stacks of its threads, even while code holds Python's lock"""
NOTICE_S = 0.2
"""time the launcher gets to show that it waits for a last checkpoint, when a signal came to every process of a run"""
GRACE_S = 1.0
"""time a process has to clean up after SIGTERM; what it leaves then, the launcher removes"""
MOST_CAUSE = 5000
"""characters of a cause; as JSON it fits into a pipe"""
RANK = "RANK"
"""environment variable of torchrun: number of a rank, 0 for the one that leads"""
MISSED = "did not get"
"""in the message of a rank that another one failed: it is not the cause"""
OUT_OF_MEMORY = (
    "OutOfMemoryError", "MemoryError", "can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc",
    "memory ran out", "CUBLAS_STATUS_ALLOC_FAILED", "No available memory for the cache blocks",
)  # fmt: skip
"""what torch (on a CPU and on a GPU), C++ and vLLM write when an allocation fails"""


# ------------------------------------------------------------------------------------------------ a command


class Interrupted(KeyboardInterrupt):
    """The command was told to end; the message is the signal's name. It is no Exception: code that guards itself
    against whatever a user's function raises must not swallow it."""

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells say it: 130 for Ctrl-C, 143 for SIGTERM, 129 SIGHUP, 138 SIGUSR1."""
        return 128 + signal.Signals[str(self)]


class Terminated(SystemExit):
    """A child was told to end by SIGTERM. A class of its own, so that a task's `sys.exit` is not taken for it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first signal raises Interrupted; the handlers before are put back at the end. Inside another
    `interruptible`, or in another thread than the main one, this changes nothing."""
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
            if signal.getsignal(s) != signal.SIG_IGN:  # set by `ignore_interrupts(to_the_end=True)`
                signal.signal(s, handler)


@contextmanager
def _collected(usual: Callable[[int, FrameType | None], None]) -> Iterator[list[str]]:
    """Inside, signals that `usual` handles add their name to the list, and nothing else happens."""
    came: list[str] = []
    held = [s for s in SIGNALS if signal.getsignal(s) == usual]
    if threading.current_thread() is not threading.main_thread():
        held = []
    for s in held:
        signal.signal(s, lambda number, _: came.append(signal.Signals(number).name))
    try:
        yield came
    finally:
        for s in held:
            signal.signal(s, usual)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, a signal is kept, and raises Interrupted at the end. For short work that must not be left half done."""
    waiting: list[str] = []
    try:
        with _collected(_interrupt) as waiting:
            yield
    finally:
        if waiting:
            _interrupt(signal.Signals[waiting[0]], None)


@contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Inside, a signal adds its name to the list and raises nothing: for code that must not be cut short, or that
    would turn Interrupted into something else, and that looks at the list often."""
    with _collected(_interrupt) as came:
        yield came


@contextmanager
def further_signals() -> Iterator[list[str]]:
    """Signals that arrive inside, after an Interrupted, add their name to the list and do nothing else."""
    with _collected(_nothing) as came:
        yield came


def ignore_interrupts(*, to_the_end: bool = False) -> None:
    """From now on the signals do nothing; `to_the_end`: nor while the interpreter ends, which takes a moment."""
    if threading.current_thread() is threading.main_thread():
        for s in SIGNALS:
            # A handler that does nothing, not SIG_IGN: Python writes a traceback when a signal came just before
            # SIG_IGN was set. But while the interpreter ends it removes its own handlers, and needs SIG_IGN.
            signal.signal(s, signal.SIG_IGN if to_the_end else _nothing)


def ignores_interrupts() -> bool:
    """Whether this process has been told to end, and cleans up: further signals do nothing."""
    return signal.getsignal(signal.SIGINT) is _nothing


def _nothing(number: int, _: FrameType | None) -> None:
    pass


def _interrupt(number: int, _: FrameType | None) -> None:
    ignore_interrupts()
    raise Interrupted(signal.Signals(number).name)


# ------------------------------------------------------------------------------------------------ a child


def run_process(spec: ProcessSpec, work: Callable[[], None], *, from_outside: bool = False) -> NoReturn:
    """Run `work` as the process that `spec` describes, and exit: with 0, or with the cause left in the run folder and
    in the launcher's pipe (2 for a UserError, else 1), or with TOLD_TO_END after SIGTERM. `from_outside`: a user
    started this process, who reads the cause on the terminal and may end it by Ctrl-C."""
    signal.signal(signal.SIGINT, _terminate if from_outside else signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate if from_outside else partial(_terminate_unless_ending, spec.path))
    signal.signal(signal.SIGHUP, signal.SIG_DFL if from_outside else signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL if from_outside else signal.SIG_IGN)
    _exit_with_launcher(spec.pipes)
    with suppress(OSError, RunFailed):  # a full disk is reported by those who lose something by it
        dump_stacks_on_signal(RunFolder(spec.path).stacks(spec.name))
    bind_threads(spec)
    try:
        work()
    except SystemExit as order:
        if order.code is None or isinstance(order.code, int):
            _exit(order.code or 0)
        _fail(spec, "run", f"SystemExit: {order.code}")
    except (UserError, RunFailed) as error:
        if from_outside:
            print(f"async-rl: {spec.name}: {error}", file=sys.stderr)
        _fail(spec, "user" if isinstance(error, UserError) else "run", str(error))
    except OSError as error:  # most of them: a full disk
        if error.errno == errno.ENOMEM:
            _fail(spec, "memory", str(error))
        _fail(spec, "run", f"{error}; is its disk full or read-only? Then make room and resume the run")
    except BaseException as error:  # a process boundary: reported, and it ends the run
        with suppress(OSError):
            traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        _fail(spec, "memory" if is_out_of_memory(message) else "run", message)
    _exit(0)


_stacks: BinaryIO | None = None
"""open as long as this process lives"""


def stacks_file() -> int:
    """Descriptor of the file that stacks are written to, among the lowest of this process; -1: there is none."""
    return -1 if _stacks is None else _stacks.fileno()


def dump_stacks_on_signal(path: Path | None = None) -> None:
    """From now on STACKS_SIGNAL, or a crash, appends the stacks of all threads to this file; without `path`: to the one
    named before. To be called again where libraries were loaded since: some of them (tvm_ffi, which vLLM loads) take
    over the handler of crashes and write elsewhere. Main thread only."""
    global _stacks
    if path is not None:
        _stacks = path.open("ab")
    if _stacks is not None:
        faulthandler.unregister(STACKS_SIGNAL)
        signal.signal(STACKS_SIGNAL, signal.SIG_DFL)
        faulthandler.register(STACKS_SIGNAL, file=_stacks, all_threads=True)
        faulthandler.disable()  # where it is enabled, enabling it takes no handler back
        faulthandler.enable(file=_stacks, all_threads=True)


def state_of(pid: int) -> str:
    """The letter that the system gives a process's state (proc(5): T stopped, Z ended and not yet waited for); empty:
    there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_out_of_memory(message: str) -> bool:
    """Whether an error's message tells of a failed allocation."""
    return any(words in message for words in OUT_OF_MEMORY)


def bind_threads(spec: ProcessSpec) -> None:
    """Keep this process, and threads begun later, to its cores, if it was given any; a rank takes those of its
    LOCAL_RANK."""
    if spec.cores:
        os.sched_setaffinity(0, spec.cores[int(os.environ.get("LOCAL_RANK", "0")) % len(spec.cores)])


def process_name(rank: int) -> str:
    """The name of a trainer's rank in logs and messages. Rank 0 is what the run knows as its trainer."""
    return "trainer" if rank == 0 else f"trainer-rank-{rank}"


def on_sigterm(leave: Callable[[], None], run: Path) -> None:
    """From now on SIGTERM calls `leave`, which has `GRACE_S` to end the process, unless the launcher of the run in the
    folder `run` waits for a last checkpoint. Main thread only."""

    def ordered(*_: object) -> None:
        if _launcher_waits(run):
            return
        _exit_after_grace()
        leave()

    signal.signal(signal.SIGTERM, ordered)


def exit_with(pid: int, grace_s: float = 0.0) -> None:
    """From now on this process ends as soon as process `pid` does, however that ends. With `grace_s` it is sent
    SIGTERM first and has so long to clean up."""
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


def adopt_pipes(agent: int, pipes: Pipes) -> Pipes:
    """For a rank that torch's elastic agent started: end when the agent ends, and open the launcher's pipes, which
    the agent (process number `agent`) holds as `pipes` and does not pass on. A pipe that is gone becomes NO_PIPE."""
    exit_with(agent)

    def opened(end: int, mode: int) -> int:
        with suppress(OSError):
            # Without O_NONBLOCK, opening would wait for the other end if that is gone.
            return os.open(f"/proc/{agent}/fd/{end}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
        return NO_PIPE

    parent = opened(pipes.parent, os.O_RDONLY)
    if parent != NO_PIPE:
        os.set_blocking(parent, True)
    return Pipes(parent=parent, cause=opened(pipes.cause, os.O_WRONLY), pulse=opened(pipes.pulse, os.O_WRONLY))


def _exit_with_launcher(pipes: Pipes) -> None:
    """No orphans: the launcher holds the other end of a pipe; when the launcher is gone, this process ends."""
    if pipes.parent == NO_PIPE:
        return

    def watch() -> None:
        while os.read(pipes.parent, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread removes what it has made
        time.sleep(2 * GRACE_S)
        os._exit(TOLD_TO_END)  # the main thread is in something that cannot be interrupted

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _terminate(*_: object) -> NoReturn:
    """The handler of SIGTERM: clean up and end."""
    _exit_after_grace()
    raise Terminated(TOLD_TO_END)


def _terminate_unless_ending(run: Path, *_: object) -> None:
    """The handler of SIGTERM in a child. A scheduler may send its signal to every process of a job: where the launcher
    was told to end as well, and waits for a last checkpoint, this child goes on until the launcher ends it."""
    if not _launcher_waits(run):
        _terminate()


def _launcher_waits(run: Path) -> bool:
    """Whether the launcher shows within NOTICE_S that it waits for a last checkpoint (`RunFolder.ending`)."""
    deadline = time.monotonic() + NOTICE_S
    while not (waits := RunFolder(run).ending.exists()) and time.monotonic() < deadline:
        time.sleep(NOTICE_S / 10)
    return waits


def _exit_after_grace() -> None:
    """A thread that waits for something must not hold up the end."""
    timer = threading.Timer(GRACE_S, os._exit, (TOLD_TO_END,))
    timer.daemon = True
    timer.start()


def fail(spec: ProcessSpec, message: str) -> NoReturn:
    """End this process now, from anywhere in it, and leave the cause."""
    _fail(spec, "run", message)


def _fail(spec: ProcessSpec, kind: str, message: str) -> NoReturn:
    """Leave the cause of a bad end in every place that takes it, and exit."""
    folder = RunFolder(spec.path)
    cause = json.dumps({"kind": kind, "message": message[:MOST_CAUSE], "time": time.monotonic()})
    if spec.pipes.cause != NO_PIPE:
        with suppress(OSError):  # the pipe first: it needs no disk
            os.write(spec.pipes.cause, cause.encode() + b"\n")
    with suppress(OSError):
        folder.failure(spec.name).write_text(cause)
    with suppress(RunFailed):
        folder.record(ProcessFailed(process=spec.name, message=message))
    _exit(2 if kind == "user" else 1)


def _exit(code: int) -> NoReturn:
    """End now: nothing is left to clean up, and threads of libraries need not be waited for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
