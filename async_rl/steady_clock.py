"""Seconds since 1970 that never jump (`steady_time`): what is compared or subtracted, of one process.

The clock on the wall is set back and forth: by hand, by NTP after a boot, by a virtual machine that wakes up. A wait
that was measured with it would end at once, or not at all. This one is the wall's when the process begins and then goes
on by itself; while the machine sleeps it stands still.
"""

from __future__ import annotations

import time

_BEGAN = time.time() - time.monotonic()


def steady_time() -> float:
    """Seconds since 1970, as this process counts them."""
    return _BEGAN + time.monotonic()
