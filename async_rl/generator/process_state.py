"""What belongs to the whole process and a task's code may change: it is put back after every step (`KeptState`).

Put back are the working directory, the locale, the soft limits on memory, files and processor time, Python's recursion
limit, torch's default dtype, default device, number of threads and precision of matrix products, and in the main thread
the handlers of the signals that this process needs. The states of the random generators of Python, numpy and torch are
left as the task makes them: nothing is sampled from them here (generator/sampling.py).

Limits and locale take several microseconds to read, as much as a step of a game: they are looked at once in `LOOK_S` at
most.
"""

from __future__ import annotations

import _locale
import _signal  # type: ignore[import-not-found]  # signal.getsignal takes ten times as long
import locale
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from async_rl.process import STACKS_SIGNAL, dump_stacks_on_signal, ignores_interrupts

LIMITS = ("NOFILE", "FSIZE", "AS", "CPU")
"""of what a process may use (getrlimit), soft ones"""
LOOK_S = 0.001
"""between two looks at what takes long to read"""
WATCHED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGCHLD)


@dataclass(slots=True, eq=False)
class KeptPart:
    """One part of the state."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    value: Any = None
    """that it shall have"""
    slow: bool = False
    """it takes long to read"""


@dataclass(slots=True, eq=False)
class KeptState:
    """The state of the process when this was made."""

    parts: list[KeptPart] = field(default_factory=list)
    reported: set[str] = field(default_factory=set)
    """parts of which the log has been told"""
    quick: list[KeptPart] = field(default_factory=list)
    reads: list[Callable[[], Any]] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    """of the parts that are read quickly"""
    looked: float = 0.0
    """when the others were looked at last; monotonic clock"""

    def __post_init__(self) -> None:
        self.parts = [
            KeptPart("the working directory", _directory, _change_directory),
            KeptPart("the locale", partial(_locale.setlocale, _locale.LC_ALL), _set_locale, slow=True),
            KeptPart("Python's recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
            *(_limit_part(name) for name in LIMITS),
        ]
        if (torch := sys.modules.get("torch")) is not None:  # this file is also imported where torch must not be
            self.parts += [
                KeptPart("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
                KeptPart("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
                KeptPart(
                    "torch's precision of matrix products",
                    torch._C._get_float32_matmul_precision,
                    torch.set_float32_matmul_precision,
                ),
                KeptPart(
                    "torch's default device",
                    # get_default_device takes ten times as long; this module is only loaded when one was set
                    lambda: getattr(sys.modules.get("torch.utils._device"), "CURRENT_DEVICE", None),
                    torch.set_default_device,
                ),
            ]
        for part in self.parts:
            part.value = part.read()
        self._sort()

    def _sort(self) -> None:
        self.quick = [part for part in self.parts if not part.slow]
        self.reads, self.values = [part.read for part in self.quick], [part.value for part in self.quick]

    def watch_signals(self) -> None:
        """Handlers as they are now are put back, too. Main thread only."""
        self.leave_signals()
        for number in WATCHED_SIGNALS:
            self.parts.append(_signal_part(number))
        self.parts.append(
            KeptPart(
                f"the handler of {STACKS_SIGNAL.name}",
                partial(_signal.getsignal, STACKS_SIGNAL),
                lambda _: dump_stacks_on_signal(),
                _signal.getsignal(STACKS_SIGNAL),
            )
        )
        self._sort()

    def leave_signals(self) -> None:
        """Handlers are not put back any more."""
        self.parts = [part for part in self.parts if not part.name.startswith("the handler of ")]
        self._sort()

    def restore(self, now: float | None = None) -> bool:
        """Put back what has changed. Returns whether anything had. `now`: monotonic clock; None: look at everything,
        however long that takes."""
        if now is not None and now - self.looked < LOOK_S:
            if [read() for read in self.reads] == self.values:
                return False
        else:
            self.looked = time.monotonic()
        changed = False
        for part in self.parts:
            if part.read() != part.value:
                self._put_back(part)
                changed = True
        return changed

    def _put_back(self, part: KeptPart) -> None:
        if part.name.startswith("the handler of ") and (
            threading.current_thread() is not threading.main_thread() or ignores_interrupts()
        ):
            return
        part.write(part.value)
        if part.name not in self.reported:
            self.reported.add(part.name)
            with suppress(OSError, ValueError):  # a closed stream
                print(f"the task or its reward changed {part.name}; it was put back", file=sys.stderr)


def _limit_part(name: str) -> KeptPart:
    number = getattr(resource, f"RLIMIT_{name}")

    def read() -> int:
        return resource.getrlimit(number)[0]

    def write(soft: int) -> None:
        with suppress(OSError, ValueError):  # the hard limit was lowered, too
            resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))

    return KeptPart(f"the limit {name} (ulimit)", read, write, slow=True)


def _signal_part(number: signal.Signals) -> KeptPart:
    read = partial(_signal.getsignal, number)

    def write(value: Any) -> None:
        if value is not None:  # else a handler that Python did not set
            signal.signal(number, value)

    return KeptPart(f"the handler of {number.name}", read, write, read())


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""


def _change_directory(path: str) -> None:
    with suppress(OSError):
        os.chdir(path)


def _set_locale(value: str) -> None:
    with suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, value)
