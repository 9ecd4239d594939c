"""Two machines on this one: each has a network, a name, a boot id and shared memory of its own. Only root may make
them.

They see the same files, as nodes with a shared file system do, and each other over a cable (a veth pair).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ADDRESSES = ("10.78.41.1", "10.78.41.2")
NETWORK = "10.78.41.0/24"
NAMES = ("first-node", "second-node")


@dataclass
class TwoMachines:
    """`folder`: for what each of them has of its own."""

    folder: Path
    spaces: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.spaces = [f"async-rl-{os.getpid()}-m{number}" for number in range(2)]

    def __enter__(self) -> TwoMachines:
        """Raises OSError or CalledProcessError where they cannot be made."""
        try:
            (self.folder / "hosts").write_text(
                "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
            )
            for number, space in enumerate(self.spaces):
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
                self._memory(number).mkdir()
                (self.folder / f"boot-{number}").write_text(f"{space}\n")
            first, second = self.spaces
            _ip(
                "link", "add", self._cable(first), "netns", first, "type", "veth",
                "peer", "name", self._cable(second), "netns", second,
            )  # fmt: skip
            for space, address in zip(self.spaces, ADDRESSES, strict=True):
                _ip("-n", space, "addr", "add", f"{address}/24", "dev", self._cable(space))
                _ip("-n", space, "link", "set", self._cable(space), "up")
            subprocess.run([*self.command(0), "true"], check=True, capture_output=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number, space in enumerate(self.spaces):
            self.kill(number)
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
            shutil.rmtree(self._memory(number), ignore_errors=True)

    def command(self, number: int) -> list[str]:
        """What a command begins with that runs on this machine."""
        inside = (
            f"hostname {NAMES[number]} && mount --bind {self._memory(number)} /dev/shm && "
            f"mount --bind {self.folder}/hosts /etc/hosts && "
            f'mount --bind {self.folder}/boot-{number} /proc/sys/kernel/random/boot_id && exec "$@"'
        )
        space = ["ip", "netns", "exec", self.spaces[number]]
        return [*space, "unshare", "--uts", "--mount", "sh", "-c", inside, "sh"]

    def kill(self, number: int) -> None:
        """End every process of a machine."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.spaces[number]], capture_output=True, text=True, check=False
        )
        for pid in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def lose(self, number: int) -> None:
        """The machine loses its power: the other hears nothing of it any more, not even that its processes end."""
        _ip("-n", self.spaces[number], "link", "set", self._cable(self.spaces[number]), "down")
        self.kill(number)

    def _cable(self, space: str) -> str:
        return f"arl{os.getpid() % 100_000}{space[-2:]}"

    def _memory(self, number: int) -> Path:
        return Path("/dev/shm") / self.spaces[number]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
