"""Which machine this is: two processes on one may share memory."""

from __future__ import annotations

import socket
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> str:
    """The same for every process since the machine was started, another on every other machine."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()
