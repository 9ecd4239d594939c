"""Which episode's code a generator runs now, left where it can be read when the process is gone (`StepMark`).

A problem whose reward crashes or freezes whoever runs it leaves no word of its own. The mark is a few bytes of a file
that is mapped into memory: setting it costs no system call, and the kernel keeps it when the process dies.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

Key = tuple[int, int]
"""(group, sample)"""
_MARK = struct.Struct("<qq")
_NOTHING = bytes(_MARK.size)
EPISODE: ContextVar[Key | None] = ContextVar("episode", default=None)
"""(group, sample) of the episode that the running asyncio task plays; None: it plays none"""


@dataclass(slots=True)
class StepMark:
    """The mark of this process. `StepMark.create(path)` begins without one."""

    _bytes: mmap.mmap

    @classmethod
    def create(cls, path: Path) -> StepMark:
        """The mark in the file `path`, which is made anew. Raises OSError."""
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(file, 0)
            os.ftruncate(file, _MARK.size)
            return cls(mmap.mmap(file, _MARK.size))
        finally:
            os.close(file)

    def set(self) -> None:
        """Code of the task begins to run for the episode of this asyncio task, if it is one."""
        if (key := EPISODE.get()) is not None:
            _MARK.pack_into(self._bytes, 0, key[0] + 1, key[1])

    def clear(self) -> None:
        """No code of the task runs."""
        self._bytes[:] = _NOTHING


def marked_group(path: Path) -> int:
    """The group whose code the process ran when it last wrote its mark; -1: none, or no mark can be read."""
    try:
        group, _ = _MARK.unpack(path.read_bytes()[: _MARK.size])
    except (OSError, struct.error):
        return -1
    return int(group) - 1
