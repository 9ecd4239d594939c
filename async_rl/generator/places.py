"""Places that the episodes of a process share (`Slots`), e.g. browsers or licences."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping


class Slots:
    """Places that the episodes of a process share.

    Args:
        limits: how many there are of each name.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._places = {name: asyncio.Semaphore(limit) for name, limit in limits.items()}

    def of(self, name: str) -> asyncio.Semaphore:
        """Raises ValueError for a name that is not known."""
        if name not in self._places:
            known = ", ".join(self._places) or "none"
            raise ValueError(
                f"there are no slots named '{name}' (known: {known}); name them in the task's `slots`, or in "
                "generator.task_slots"
            )
        return self._places[name]
