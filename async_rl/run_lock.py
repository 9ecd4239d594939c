"""One launcher at a time works on a run folder.

The lock belongs to an open file that the launcher's children inherit, so it is free when the last process
of a launch is gone, however they ended: a resumed run never meets the last words of the one before.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from async_rl.errors import UserError

POLL_S = 0.05


def take_lock(path: Path, seconds: float) -> int:
    """The descriptor of the held lock, to be passed to children. Waits up to `seconds` for processes whose
    launcher is dead; raises UserError when they stay, or at once when that launcher is alive."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            alive = owner.isdecimal() and Path(f"/proc/{owner}").exists()
            if alive or time.monotonic() > deadline:
                os.close(descriptor)
                raise UserError(_taken(path.parent, owner, alive, seconds)) from None
            time.sleep(POLL_S)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _taken(run: Path, owner: str, alive: bool, seconds: float) -> str:
    if alive:
        return f"{run}: a launcher (process {owner}) is still running it; end that one first"
    return (
        f"{run}: its launcher is dead, but {seconds:g} s later a process it started still lives (frozen?); "
        f"`pgrep -af {run}` shows it, end it and resume again"
    )
