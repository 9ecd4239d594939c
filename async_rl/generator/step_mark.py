"""Which episodes' code a generator runs now, left where it can be read when the process is gone (`StepMark`).

A problem whose reward crashes or freezes whoever runs it leaves no word of its own. The marks are a few bytes of a file
that is mapped into memory: setting one costs no system call, and the kernel keeps them when the process dies.

The code of one episode runs at a time in the event loop: that is the step. Others may run code in threads meanwhile, or
wait for something that is not the engine; these are held.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

Key = tuple[int, int]
"""(group, sample)"""
_MARK = struct.Struct("<qqQ")
_NOTHING = bytes(_MARK.size)
MOST_HELD = 1023
"""more episodes than these are not marked"""
AT_ENGINE: Counter[Key] = Counter()
"""calls of each episode that wait for the engine, or for other episodes, and not for code of the task"""
EPISODE: ContextVar[Key | None] = ContextVar("episode", default=None)
"""(group, sample) of the episode that the running asyncio task plays; None: it plays none"""


@dataclass(slots=True)
class StepMark:
    """The marks of this process. `StepMark.create(path)` begins without one."""

    _bytes: mmap.mmap
    _free: list[int] = field(default_factory=lambda: list(range(MOST_HELD, 0, -1)))
    _held: dict[tuple[Key, int], int] = field(default_factory=dict)
    """(key, thread) -> its place in the file"""

    @classmethod
    def create(cls, path: Path) -> StepMark:
        """The marks in the file `path`, which is made anew. Raises OSError."""
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(file, 0)
            os.ftruncate(file, _MARK.size * (1 + MOST_HELD))
            return cls(mmap.mmap(file, _MARK.size * (1 + MOST_HELD)))
        finally:
            os.close(file)

    def watch_exit(self) -> None:
        """From now on `os._exit` in code of an episode, in a thread too, leaves that episode's mark."""
        leave, pid = os._exit, os.getpid()

        def marked(status: int) -> NoReturn:
            if os.getpid() == pid:  # else it is a child that the task forked
                self.set()
            leave(status)

        os._exit = marked

    def set(self) -> None:
        """Code of the task begins to run for the episode of this asyncio task, if it is one."""
        if (key := EPISODE.get()) is not None:
            _MARK.pack_into(self._bytes, 0, key[0] + 1, key[1], 0)

    def clear(self) -> None:
        """No code of the task runs in the event loop."""
        self._bytes[: _MARK.size] = _NOTHING

    def group(self) -> int:
        """The group whose code runs in the event loop now; -1: none."""
        return int(_MARK.unpack_from(self._bytes, 0)[0]) - 1

    def hold(self, key: Key, thread: int = 0) -> None:
        """Code of this episode runs in a thread (its `threading.get_ident()`), or, 0, elsewhere: its rollout waits for
        something that is not the engine."""
        if self._free and (key, thread) not in self._held:
            place = self._held[key, thread] = self._free.pop()
            _MARK.pack_into(self._bytes, place * _MARK.size, key[0] + 1, key[1], thread)

    def release(self, key: Key, thread: int = 0) -> None:
        """That is over."""
        place = self._held.pop((key, thread), None)
        if place is not None:
            self._bytes[place * _MARK.size : (place + 1) * _MARK.size] = _NOTHING
            self._free.append(place)


class MarkedThreads(ThreadPoolExecutor):
    """Threads that mark the episode whose code they run (`asyncio.to_thread`)."""

    def __init__(self, threads: int, mark: StepMark | None) -> None:
        super().__init__(threads, thread_name_prefix="task")
        self._mark = mark

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As ThreadPoolExecutor's."""
        key = EPISODE.get()
        if self._mark is None or key is None:
            return super().submit(fn, *args, **kwargs)
        return super().submit(self._run, self._mark, key, fn, args, kwargs)

    @staticmethod
    def _run(mark: StepMark, key: Key, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        thread = threading.get_ident()
        mark.hold(key, thread)
        try:
            return fn(*args, **kwargs)
        finally:
            mark.release(key, thread)


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What a process that is gone had marked last."""

    step: int = -1
    """group whose code ran in its event loop; -1: none"""
    held: tuple[tuple[int, int], ...] = ()
    """(group, thread) of the others that ran code; thread 0: their rollout waited for something"""

    @classmethod
    def read(cls, path: Path) -> Marks:
        """Those in the file; none where it cannot be read."""
        try:
            rows = list(_MARK.iter_unpack(path.read_bytes()))
        except (OSError, struct.error):
            return cls()
        held = tuple((int(group) - 1, int(thread)) for group, _, thread in rows[1:] if group)
        return cls(step=int(rows[0][0]) - 1 if rows else -1, held=held)
