"""Rows of a JSONL file that may be long: of one that is larger than `MOST_BYTES`, evenly spread stretches are read.

So a look at a run takes as long after a million steps as after ten thousand. The newest rows are always among them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

MOST_BYTES = 24 << 20
"""of one file: some ten thousand rows of metrics"""
_STRETCHES, _SHORTEST = 600, 8 << 10
"""most stretches; fewest bytes of one, which hold a few rows"""
_NEWEST_BYTES = 1 << 20
"""read in one piece at the end of a file"""
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRows:
    """What was read of a file."""

    rows: list[dict[str, Any]]
    """in the order of the file"""
    share: float
    """of the file, 0 to 1; 1: all of it"""
    end: int
    """where the rows that follow will begin, bytes"""
    torn: bool
    """the last line is not whole: still being written, or never finished"""
    broken: int
    """lines that cannot be read"""


def read_spread(path: Path, most_bytes: int = MOST_BYTES) -> ReadRows:
    """The rows of a file, or of a large one some that are evenly spread."""
    rows: list[dict[str, Any]] = []
    taken = broken = 0
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            end = 0
            for first, last in _stretches(size, most_bytes):
                begin = max(first - 1, 0)  # whether a line begins at `first` is seen in the byte before
                file.seek(begin)
                content = file.read(last - begin)
                if first:
                    _, _, content = content.partition(b"\n")
                content, newline, rest = content.rpartition(b"\n")
                end = last - len(rest)
                taken += len(content) + len(newline)
                for line in content.split(b"\n"):
                    row = row_of(line)
                    if row is not None:
                        rows.append(row)
                    else:
                        broken += _is_broken(line)
    except FileNotFoundError:
        return ReadRows(rows=[], share=1.0, end=0, torn=False, broken=0)
    share = 1.0 if size <= most_bytes else taken / max(end, 1)
    return ReadRows(rows=rows, share=share, end=end, torn=end < size, broken=broken)


def row_of(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None: it holds none."""
    try:
        row = _decode(line)
    except (ValueError, msgspec.MsgspecError):  # NaN and infinite numbers are read by json alone
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
    return row if isinstance(row, dict) else None


def _is_broken(line: bytes) -> bool:
    """Whether a line that is no row is none in JSON either."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return bool(line.strip())
    return False


def _stretches(size: int, most_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, last) bytes of each stretch, disjoint, in order."""
    if size <= most_bytes:
        yield 0, size
        return
    newest = min(_NEWEST_BYTES, most_bytes // 4)
    count = max(1, min(_STRETCHES, (most_bytes - newest) // _SHORTEST))
    length = (most_bytes - newest) // count
    for i in range(count):
        first = (size - newest) * i // count
        yield first, first + length
    yield size - newest, size
