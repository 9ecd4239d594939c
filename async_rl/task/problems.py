"""The problems of a split, each made when it is asked for (`ProblemsOnDemand`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload

from async_rl.task.protocol import Problem


class ProblemsOnDemand(Sequence[Problem]):
    """A sequence whose subclasses say how many problems there are (`__len__`) and make one (`make`).

    The last one is kept: a group's samples ask for one problem, one after the other.
    """

    _last: Problem | None = None

    @abstractmethod
    def make(self, index: int) -> Problem:
        """The problem at `index`, 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        index %= len(self)
        last = self._last
        if last is None or last.index != index:
            last = self._last = self.make(index)
        return last
