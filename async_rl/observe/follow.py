"""A JSONL file that others append to and a resumed launch may cut: its new rows, whatever happens to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Follower:
    path: Path
    _offset: int = field(default=0, init=False)
    """bytes read"""
    _file: tuple[int, int] = field(default=(0, 0), init=False)
    """device and inode: a resumed launch puts a new file in place"""

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """Whole rows since the last call, and whether the file began anew (then these are all its rows). Lines
        that cannot be read are left out; one that is still being written comes later."""
        try:
            with self.path.open("rb") as file:
                stat = self.path.stat()
                again = (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset
                if again:
                    self._offset, self._file = 0, (stat.st_dev, stat.st_ino)
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            again, self._offset, self._file = self._offset > 0, 0, (0, 0)
            return [], again
        self._offset += len(whole) + len(newline)
        return [row for line in whole.splitlines() if (row := _object(line)) is not None], again


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
