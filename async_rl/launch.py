"""Start the processes of a run, watch them, show what happens, and leave nothing behind.

Who waits for whom: the launcher waits for its children and for nobody's messages; it reads the metric rows
the trainer writes. The first child that ends badly ends the run, with its reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from async_rl.errors import RunFailed, UserError
from async_rl.observe.console import Console
from async_rl.preflight import preflight
from async_rl.process import PARENT_PIPE
from async_rl.run_folder import RunFolder, read_rows
from async_rl.settings import Settings
from async_rl.weights.shared_memory import segment_path
from async_rl.wire.channel import Router, ipc_endpoint

POLL_S = 0.1
STOP_S = 3.0
"""time children get to end by themselves after being told to"""
FINISH_S = 15.0
"""time the others get after the trainer is done"""


class Interrupted(Exception):
    """Ctrl-C or an order to end."""


@dataclass(slots=True)
class Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(slots=True)
class Launcher:
    """One run from start to end."""

    settings: Settings
    folder: RunFolder
    console: Console
    children: list[Child] = field(default_factory=list)
    pipe: tuple[int, int] = (-1, -1)
    shown: int = 0

    def run(self) -> dict[str, Any]:
        """The run's summary. Raises UserError, RunFailed or Interrupted; all processes are gone then."""
        facts = preflight(self.settings)
        endpoint = self.endpoint()
        self.folder.create(self.settings)
        self.console.start(self.settings, self.folder.path, facts.notes)
        before = {s: signal.signal(s, _interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        started = time.monotonic()
        try:
            self.pipe = os.pipe()
            self.start(endpoint, facts.train_problems)
            self.watch()
            return self.finish(time.monotonic() - started)
        finally:
            for s in (signal.SIGINT, signal.SIGTERM):
                signal.signal(s, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning up
            self.stop()
            self.clean(endpoint)
            self.console.stop()
            for s, handler in before.items():
                signal.signal(s, handler)

    def endpoint(self) -> str:
        """Where the buffer will listen. Raises UserError when that is taken."""
        chosen = self.settings.wire.endpoint
        if chosen == "auto":
            return ipc_endpoint(self.folder.path)
        with Router(chosen) as probe:
            return probe.endpoint

    # ------------------------------------------------------------------ start

    def start(self, endpoint: str, train_problems: int) -> None:
        path = str(self.folder.path)
        self.spawn("buffer", ["async_rl.buffer", path, endpoint, str(train_problems), "0"], threads=1)
        self.spawn("trainer", ["async_rl.trainer", path, endpoint, "0"], threads=self.settings.trainer.threads)
        for i in range(self.settings.generator.count):
            name = f"generator-{i}"
            self.spawn(name, ["async_rl.generator", path, endpoint, name], threads=self.settings.generator.threads)

    def spawn(self, name: str, command: list[str], *, threads: int) -> None:
        log = self.folder.logs / f"{name}.log"
        environment = {
            **os.environ,
            PARENT_PIPE: str(self.pipe[0]),
            # before torch is imported: two processes with a thread a core each run ten times slower
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
                pass_fds=(self.pipe[0],),
                start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
            )
        self.children.append(Child(name, process, log))
        self.folder.event("started", process=name, pid=process.pid, time=time.time())

    # ------------------------------------------------------------------ watch

    def watch(self) -> None:
        """Until the trainer is done. Raises RunFailed when any process ends before its time."""
        done_at: float | None = None
        while any(child.process.poll() is None for child in self.children):
            self.show()
            self.check()
            if done_at is None and self.child("trainer").process.poll() == 0:
                done_at = time.monotonic()
            if done_at is not None and time.monotonic() - done_at > FINISH_S:
                alive = [c.name for c in self.children if c.process.poll() is None]
                self.folder.event("ended_by_force", processes=alive, time=time.time())
                return
            time.sleep(POLL_S)
        self.show()
        self.check()

    def check(self) -> None:
        ended = [c for c in self.children if c.process.poll() is not None]
        bad = [c for c in ended if c.process.returncode != 0]
        if bad:
            time.sleep(POLL_S)  # those that fell with the first one get to say so
            raise self.first_cause()
        if ended and self.child("trainer").process.poll() is None:
            raise RunFailed(f"{ended[0].name} ended before the trainer was done; see {ended[0].log}")

    def first_cause(self) -> Exception:
        """The earliest recorded failure; a process killed from outside left none."""
        reasons = []
        for child in self.children:
            record = self.folder.failure(child.name)
            if record.exists():
                reasons.append((child, json.loads(record.read_text())))
        silent = [c for c in self.children if c.process.poll() not in (None, 0) and not self.folder.failure(c.name).exists()]
        if silent:
            child = silent[0]
            code = child.process.returncode
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            return RunFailed(f"{child.name} {how}; its last words are in {child.log}{_tail(child.log)}")
        child, reason = min(reasons, key=lambda r: r[1]["time"])
        message = f"{child.name}: {reason['message']}"
        return UserError(reason["message"]) if reason["kind"] == "user" else RunFailed(f"{message} (log: {child.log})")

    def child(self, name: str) -> Child:
        return next(c for c in self.children if c.name == name)

    def show(self) -> None:
        """Rows and evaluations that are new since last time."""
        rows = list(read_rows(self.folder.metrics))
        for row in rows[self.shown :]:
            self.console.step(row)
        self.shown = len(rows)
        self.console.events(read_rows(self.folder.events))

    # -------------------------------------------------------------------- end

    def finish(self, seconds: float) -> dict[str, Any]:
        if not self.folder.summary.exists():
            raise RunFailed("the trainer ended without a summary; see its log")
        summary: dict[str, Any] = json.loads(self.folder.summary.read_text())
        summary["seconds_with_start"] = round(seconds, 3)
        self.folder.summary.write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    def stop(self) -> None:
        """End every child, kindly first."""
        alive = [c for c in self.children if c.process.poll() is None]
        for child in alive:
            child.process.terminate()
        deadline = time.monotonic() + STOP_S
        for child in alive:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        for end in self.pipe:
            if end >= 0:
                os.close(end)
        self.pipe = (-1, -1)

    def clean(self, endpoint: str) -> None:
        """What a killed process could not remove itself."""
        segment_path(self.folder.path).unlink(missing_ok=True)
        if endpoint.startswith("ipc://"):
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


def run_training(settings: Settings, path: Path, *, console: Console) -> Mapping[str, Any]:
    """Run `settings` in the run folder `path`; the summary."""
    return Launcher(settings, RunFolder(path), console).run()


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number).name)


def _tail(log: Path, lines: int = 5) -> str:
    text = log.read_text(errors="replace").strip().splitlines()[-lines:] if log.exists() else []
    return ":\n  " + "\n  ".join(text) if text else ""
