"""`async-rl` as a user runs it: in a process of its own, watched from outside through /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support_run import quick_settings

from async_rl.config.schema import to_yaml
from async_rl.run_folder import RunFolder, read_rows
from async_rl.weights.shared_memory import segment_path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LONGEST_S = 240.0
"""a test that waits longer has failed"""


def write_config(folder: Path, model: Path, *overrides: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(to_yaml(quick_settings(model, *overrides)))
    return path


def run_command(*words: object, timeout_s: float = LONGEST_S) -> subprocess.CompletedProcess[str]:
    """`async-rl words...`, to its end."""
    command = [sys.executable, "-m", "async_rl", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@dataclass
class Run:
    """A run in a process group of its own, as a terminal makes it."""

    config: Path
    folder: RunFolder
    environment: dict[str, str] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    """every process that was seen below the launcher"""
    longest_s: float = LONGEST_S

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "async_rl", "run", str(self.config), "--run-dir", str(self.folder.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Poll until it holds; the launcher must live meanwhile."""
        wait_for(lambda: condition() or self.process.poll() is not None, what, self.longest_s)
        assert self.process.poll() is None, f"ended before {what}: {self.said()}"
        self.seen |= descendants(self.process.pid)

    def wait_for_event(self, kind: str) -> None:
        self.wait_for(lambda: kind in self.events(), kind)

    def wait_for_training(self) -> None:
        self.wait_for(self.folder.metrics.exists, "the first step")

    def events(self) -> set[str]:
        return {row["event"] for row in read_rows(self.folder.events)}

    def pid(self, name: str) -> int:
        started = [r for r in read_rows(self.folder.events) if r["event"] == "started" and r["process"] == name]
        return int(started[-1]["pid"])

    def press_ctrl_c(self) -> None:
        """What a terminal does: the signal goes to the foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def said(self) -> str:
        """Wait for the end; everything it printed."""
        self.seen |= descendants(self.process.pid)
        out, _ = self.process.communicate(timeout=self.longest_s)
        return out

    def left_behind(self) -> list[str]:
        """Processes, shared memory and sockets of the run that are still there."""
        found = [f"process {pid}" for pid in self.seen if alive(pid)]
        segment = segment_path(self.folder.path)
        found += [str(path) for path in segment.parent.glob(f"{segment.name}*")]
        return found + [str(path) for path in self.folder.path.rglob("*.sock")]


def starter(folder: Path, model: Path, *always: str) -> Callable[..., Run]:
    """(overrides..., variables of the environment by name) -> a run with these and `always`."""

    def start(*overrides: str, **environment: str) -> Run:
        config = write_config(folder, model, *always, *overrides)
        return Run(config, RunFolder(folder / "run"), environment=environment)

    return start


def wait_for(condition: Callable[[], object], what: str, longest_s: float = LONGEST_S) -> None:
    deadline = time.monotonic() + longest_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {longest_s:g} s for {what}"
        time.sleep(0.02)


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found |= {int(child)} | descendants(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def alive(pid: int) -> bool:
    """A zombie is not: it waits for its parent only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
