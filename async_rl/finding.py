"""What a check found: ok, a warning or an error, with the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line. Example: `Finding(check="cores", level="ok", said="2 for 2 threads")`."""

    check: str
    """what was looked at, in a word or two"""
    level: Level
    said: str
    remedy: str = ""
    """what to do; empty where nothing is wrong"""

    def __str__(self) -> str:
        line = f"{self.level:<7}  {self.check:<18}  {self.said}"
        return f"{line}\n{'':<29}-> {self.remedy}" if self.remedy else line


def ok(check: str, said: str) -> Finding:
    return Finding(check=check, level="ok", said=said)


def warning(check: str, said: str, remedy: str) -> Finding:
    return Finding(check=check, level="warning", said=said, remedy=remedy)


def error(check: str, said: str, remedy: str) -> Finding:
    return Finding(check=check, level="error", said=said, remedy=remedy)
