"""The processes of a run as seen from outside, and signals that reach nobody else (Linux).

The number of a process may be given to another one when it ends. So a process is known by its number, the moment of
its birth and its command, and is signalled through a descriptor that belongs to it alone.
"""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from async_rl.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    name: str
    """launcher, buffer, trainer, generator-0, ..."""
    pid: int
    born: int
    """clock ticks after the machine started"""

    @property
    def role(self) -> str:
        return self.name.partition("-")[0]

    def alive(self) -> bool:
        """A zombie is not: it waits for its parent only."""
        found = _status(self.pid)
        return found is not None and found[1] == self.born and found[0] not in "ZX"

    def stopped(self) -> bool:
        found = _status(self.pid)
        return found is not None and found[1] == self.born and found[0] == "T"

    def fill_disk(self) -> None:
        """From now on nothing that it writes finds room: no file of it may grow. Pipes and sockets go on."""
        with suppress(ProcessLookupError):
            _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (0, hard))

    def send(self, number: signal.Signals) -> bool:
        """False when it is gone; nobody else ever gets the signal."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


def launcher_target(pid: int) -> Target | None:
    """A child of ours that was not waited for yet: its number is its own."""
    found = _status(pid)
    return Target(name="launcher", pid=pid, born=found[1]) if found is not None else None


def child_target(folder: RunFolder, name: str, pid: int) -> Target | None:
    """The process of this run that was started as `name`; None when it is gone, or is another one by now."""
    found = _status(pid)
    module = f"async_rl.{name.partition('-')[0]}"
    words = _words(pid)
    if found is None or module not in words or not any(f'"run":"{folder.path}"' in word for word in words):
        return None
    again = _status(pid)
    return Target(name=name, pid=pid, born=found[1]) if again is not None and again[1] == found[1] else None


def _status(pid: int) -> tuple[str, int] | None:
    """(state, time of birth in clock ticks)"""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])


def _words(pid: int) -> list[str]:
    """Its command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
