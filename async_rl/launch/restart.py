"""How often a process that dies is started again, and after which pause. No clock of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0


@dataclass(slots=True, kw_only=True)
class RestartBudget:
    """For one process."""

    max_restarts: int
    window_s: float
    """restarts are counted over this time"""
    causes: deque[tuple[float, str]] = field(default_factory=deque)
    """(time, cause) of the deaths within the window, oldest first"""

    def died(self, cause: str, now: float) -> float | None:
        """Seconds to wait before the next start: doubled with every death within the window. None when the
        budget is used up."""
        while self.causes and now - self.causes[0][0] > self.window_s:
            self.causes.popleft()
        self.causes.append((now, cause))
        if len(self.causes) > self.max_restarts:
            return None
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (len(self.causes) - 1))
