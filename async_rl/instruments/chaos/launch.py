"""The launcher of a run as its user has it: one command in a shell, what it printed last, and its processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from signal import SIGCONT, SIGINT, SIGKILL
from typing import IO

from async_rl.instruments.chaos.target import Target, child_target, launcher_target
from async_rl.run_folder import RunFolder

POLL_S = 0.02
STOP_S = 10.0
"""time a launcher gets to stop in its own way"""
LEFT_S = 5.0
"""time processes get to be gone after their launcher"""


@dataclass(slots=True, kw_only=True)
class LaunchedRun:
    """The present launch of a run, and every process that any launch of it has started."""

    folder: RunFolder
    launcher: subprocess.Popen[bytes] = field(init=False)
    output: IO[bytes] = field(init=False)
    living: dict[str, Target] = field(default_factory=dict)
    """newest process of each name in the present launch"""
    seen: dict[int, Target] = field(default_factory=dict)
    """by process id"""

    def start(self, *words: str) -> None:
        """Run `async-rl run WORDS` as from a shell."""
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  # read and closed when the launcher has ended
        self.launcher = subprocess.Popen(
            [sys.executable, "-m", "async_rl", "run", *words],
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches chaos alone, which ends the run in its own way
        )
        self.living.clear()
        if (target := launcher_target(self.launcher.pid)) is not None:
            self.living["launcher"] = self.seen[target.pid] = target

    def start_liar(self, name: str, lie: str) -> subprocess.Popen[bytes]:
        """A generator that joins the run and lies; what it says goes to the run's logs."""
        with (self.folder.logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "async_rl.instruments.chaos.liar", str(self.folder.path), name, lie],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def add(self, name: str, pid: int) -> None:
        """The run has started a process."""
        if (target := child_target(self.folder, name, pid)) is not None:
            self.living[target.name] = self.seen[target.pid] = target

    def last_words(self) -> str:
        """What the launcher printed last; all of it goes to the run's logs."""
        self.output.seek(0)
        written = self.output.read()
        self.output.close()
        if self.folder.logs.is_dir():
            with (self.folder.logs / "launcher.log").open("ab") as log:
                log.write(written)
        lines = written.decode(errors="replace").strip().splitlines()
        messages = [place for place, line in enumerate(lines) if line.startswith("async-rl: ")]
        last = lines[messages[-1] :] if messages else lines[-3:]
        return "\n".join(line for line in last if not line.startswith("`async-rl run --resume"))

    def interrupt(self) -> None:
        """Press Ctrl-C and wait; the launcher is killed if it does not end."""
        self.launcher.send_signal(SIGCONT)
        self.launcher.send_signal(SIGINT)
        self._wait(STOP_S)

    def remaining(self) -> list[Target]:
        """Processes that are still there LEFT_S after their launcher."""
        deadline = time.monotonic() + LEFT_S
        while left := [target for target in self.seen.values() if target.alive()]:
            if time.monotonic() > deadline:
                return left
            time.sleep(POLL_S)
        return []

    def kill_all(self) -> None:
        for target in self.seen.values():
            target.send(SIGKILL)
        self._wait(LEFT_S)

    def _wait(self, seconds: float) -> None:
        try:
            self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(self.launcher.pid, SIGKILL)
            self.launcher.wait()
