"""Whether the kernel has ended a process because memory ran out. It leaves SIGKILL and no word, as others do; but
it counts what it ends."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def memory_kills(root: Path = Path("/")) -> int | None:
    """Processes ended so far for lack of memory, on this machine and in this control group; None where nothing
    counts them. Only a change means something."""
    files = [root / "proc/vmstat", root / "sys/fs/cgroup/memory.events"]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                files.append(root / "sys/fs/cgroup" / line.removeprefix("0::/") / "memory.events")
    found = [count for file in dict.fromkeys(files) if (count := _counted(file)) is not None]
    return sum(found) if found else None


def _counted(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None
