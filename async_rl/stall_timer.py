"""When a wait that goes on is reported, and reported again (`StallTimer`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StallTimer:
    """When one wait is reported: once it has lasted `first_s`, then each time it has lasted twice as long."""

    first_s: float
    """wire.stall_report_s"""
    reported_s: float = 0.0
    """length of the wait when it was last reported; 0: not yet"""

    def due(self, waited_s: float) -> bool:
        """Whether a wait that has lasted so long is to be reported now. A shorter one than before is a new wait."""
        if waited_s < self.first_s:
            self.reported_s = 0.0
            return False
        if waited_s < 2 * self.reported_s:
            return False
        self.reported_s = waited_s
        return True
