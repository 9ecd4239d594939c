"""One timer of the event loop for many waits (`SharedTimer`)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

EARLY_S = 0.02
"""that a wait may be woken before its time, so that many that come due together are woken together"""


@dataclass(slots=True, eq=False)
class SharedTimer:
    """Wakes waits whose time has come. Nearly every wait for an episode ends before; a timer of its own, made and
    cancelled, would take as long as all the rest of it."""

    due: dict[asyncio.Future[None], float] = field(default_factory=dict)
    """waits, by the loop's clock"""
    timer: asyncio.TimerHandle | None = None
    loop: asyncio.AbstractEventLoop | None = None
    """whose timer it is"""

    def wake(self, waiting: asyncio.Future[None], seconds: float) -> None:
        """Give `waiting` a result in so many seconds, or a little sooner, unless it has one or is forgotten by then."""
        loop = waiting.get_loop()
        if loop is not self.loop:
            self.due.clear()
            self.loop, self.timer = loop, None
        self.due[waiting] = at = loop.time() + seconds
        if self.timer is None or at < self.timer.when():
            self._set(loop, at)

    def forget(self, waiting: asyncio.Future[None]) -> None:
        """Whoever waited does so no longer."""
        self.due.pop(waiting, None)

    def _set(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = loop.call_at(at, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self.timer = None
        now = loop.time() + EARLY_S
        for waiting in [waiting for waiting, at in self.due.items() if at <= now]:
            del self.due[waiting]
            if not waiting.done():
                waiting.set_result(None)
        if self.due:
            self._set(loop, min(self.due.values()))
