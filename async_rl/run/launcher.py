"""Start the processes of a run, watch them, show what happens, and leave nothing behind.

Who waits for whom: the launcher waits for its children and for nobody's messages; it reads the metric rows
the trainer writes. The first child that ends badly, or gives no sign of life, ends the run, with its reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from async_rl.config import Settings
from async_rl.config.schema import to_yaml
from async_rl.errors import RunFailed, UserError
from async_rl.events import (
    CheckpointDamaged,
    ProcessesLeft,
    ProcessStarted,
    RunInterrupted,
    RunResumed,
    TrackerFailed,
    read_event_rows,
)
from async_rl.objective import own
from async_rl.observe.console import Console
from async_rl.process import PARENT_PIPE, Interrupted, ignore_interrupts, interruptible, uninterrupted
from async_rl.run.child import Command, how_it_ended
from async_rl.run.crew import POLL_S, SETTLE_S, Crew, RestartBudget
from async_rl.run.liveness import Live, Vitals
from async_rl.run.placement import ANYWHERE
from async_rl.run.preflight import Facts, preflight
from async_rl.run.resume import Start, changed, find_start, resumed_settings, rewind, start_of_rollback
from async_rl.run_folder import RowTail, RunFolder, read_rollback, replace_text, take_lock
from async_rl.weights.shared_memory import segment_path
from async_rl.weights.way import WAYS
from async_rl.wire.channel import Dealer, Router, ipc_endpoint
from async_rl.wire.endpoint import as_reached_from_here, beside, is_tcp
from async_rl.wire.keys import keys_in

# -------------------- tracking
# The launcher's side of the tracker process: started beside the run, never waited for while it goes on.

TRACKER_FINISH_S = 10.0
"""time it gets to send the rest when the run has ended"""


@dataclass(slots=True)
class Tracking:
    folder: RunFolder
    process: subprocess.Popen[bytes] | None = None
    """None: no tracker, or its end has been dealt with"""

    @classmethod
    def start(cls, folder: RunFolder, names: Sequence[str], version: int, *, parent_pipe: int, lock: int) -> Self:
        """`version`: where this launch begins; `parent_pipe`: the end that closes when the launcher is done or dies;
        `lock`: of the run, so that the next launch waits for the end of this one's tracker."""
        if not names:
            return cls(folder)
        with (folder.logs / "tracker.log").open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "async_rl.observe", str(folder.path), str(version), *names],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, PARENT_PIPE: str(parent_pipe)},
                pass_fds=(parent_pipe, lock),
                start_new_session=True,
            )
        folder.record(ProcessStarted(process="tracker", pid=process.pid))
        return cls(folder, process)

    def look(self) -> None:
        """A tracker that has ended is told of once; the run goes on."""
        if self.process is None or self.process.poll() is None:
            return
        code, self.process = self.process.returncode, None
        if code != 0:
            self._failed(f"it {how_it_ended(code)}; see {self.folder.logs / 'tracker.log'}")

    def finish(self) -> None:
        """The pipe is closed: wait a little for the rest to be sent."""
        if self.process is None:
            return
        try:
            self.process.wait(TRACKER_FINISH_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.process = None
            self._failed(f"it did not send everything within {FINISH_S:g} s after the end of the run, and was ended")
        self.look()

    def _failed(self, reason: str) -> None:
        with suppress(RunFailed):  # a full disk: what matters has been said by others
            self.folder.record(TrackerFailed(name="tracker", reason=reason))


WEIGHTS = "weights"
"""name of the weight server's process"""
FINISH_S = 15.0
"""time the others get after the trainer is done"""
LAST_LAUNCH_S = 15.0
"""time processes of a launch whose launcher was killed get to notice it"""


class GoneBack(Exception):
    """The trainer has given its last steps up: the run is to go on from an earlier checkpoint, in a new launch."""


@dataclass(slots=True)
class Launcher:
    """One launch of a run, from start to end."""

    settings: Settings
    folder: RunFolder
    console: Console
    start_at: Start | None = None
    """where a resumed run goes on; None: a new run"""
    crew: Crew = field(init=False)
    """the processes"""
    lock: int = -1
    rows: RowTail = field(init=False)
    """metric rows not shown yet"""
    events: RowTail = field(init=False)
    weights_endpoint: str = ""
    """where the weight server listens; empty: there is none"""
    held_back: list[Command] = field(default_factory=list)
    """generators that are still to be started"""
    tracking: Tracking = field(init=False)
    goes_on: bool = False
    """this launch ends for another one to follow"""

    def __post_init__(self) -> None:
        self.rows, self.events = RowTail(self.folder.metrics), RowTail(self.folder.events)
        self.tracking = Tracking(self.folder)

    def run(self) -> dict[str, Any]:
        """The run's summary. Raises UserError, RunFailed, Interrupted or GoneBack; all processes are gone then."""
        with interruptible():
            return self._run()

    def _run(self) -> dict[str, Any]:
        facts = preflight(self.settings)
        endpoint = self.endpoint()
        self.open_folder()
        self.crew = Crew(
            self.folder,
            Vitals(self.settings.wire.frozen_after_s),
            Live(self.dealer(endpoint), self.folder, self.settings),
            self.lock,
        )
        started = time.monotonic()
        try:
            placed = [where] if (where := facts.placement.in_words()) != ANYWHERE else []
            self.console.start(self.settings, self.folder.path, placed + facts.notes)
            self.clean(endpoint)  # of a launch before that was killed: its weights must not be taken for ours
            self.start(endpoint, facts)
            self.watch()
            return self.finish(time.monotonic() - started)
        except Interrupted as order:
            self.folder.record(RunInterrupted(signal=str(order)))
            raise
        except UserError:
            self.end(endpoint)
            if self.start_at is None and not self.folder.metrics.exists():
                shutil.rmtree(self.folder.path, ignore_errors=True)  # a wrong set-up leaves nothing behind
            raise
        finally:
            self.end(endpoint)

    def end(self, endpoint: str) -> None:
        """Every process down, nothing of theirs left. May be called twice."""
        if self.goes_on:
            with uninterrupted():  # a signal stops the run as soon as this is done
                self.take_down(endpoint)
            return
        try:
            ignore_interrupts()
        finally:  # one that came just before is raised when all is done
            self.take_down(endpoint)

    def take_down(self, endpoint: str) -> None:
        self.crew.stop()
        self.tracking.finish()
        self.clean(endpoint)
        self.console.stop()

    def open_folder(self) -> None:
        """Make the folder of a new run, or put that of a resumed one into the state of its start."""
        if self.start_at is None:
            self.folder.create(self.settings)
            own.record(self.folder.path, str(self.settings.recipe["name"]))
            self.lock = take_lock(self.folder.lock, LAST_LAUNCH_S)
            return
        start = self.start_at
        for damage in start.damaged:
            self.console.say(f"{damage.path.name} is damaged and left out: {damage.reason}")
            self.folder.record(CheckpointDamaged(path=str(damage.path), reason=damage.reason))
        rewind(self.folder, start)
        new = changed(self.folder, self.settings)
        replace_text(self.folder.config, to_yaml(self.settings))
        self.folder.record(RunResumed(version=start.version, changed=new))
        self.rows.skip()  # what earlier launches wrote is not shown again
        self.events.skip()
        self.console.say(f"resuming {self.folder.path} {start.describe()}")

    @property
    def version(self) -> int:
        """It begins with."""
        return self.start_at.version if self.start_at is not None else 0

    def endpoint(self) -> str:
        """Where the buffer will listen. Raises UserError when that is taken."""
        chosen = self.settings.wire.endpoint
        if chosen == "auto":
            return ipc_endpoint(self.folder.path)
        keys = keys_in(self.settings.wire.keys)
        with Router(chosen, keys=keys) as probe:
            if is_tcp(chosen):
                with Router(beside(chosen, self.settings.weights.endpoint), keys=keys) as second:
                    self.weights_endpoint = second.endpoint
            return probe.endpoint

    def dealer(self, endpoint: str) -> Dealer:
        """To the buffer."""
        return Dealer(as_reached_from_here(endpoint), "launcher", keys=keys_in(self.settings.wire.keys))

    # ------------------------------------------------------------------ start

    def start(self, endpoint: str, facts: Facts) -> None:
        path = str(self.folder.path)
        version = str(self.version)
        chosen = self.settings.generator
        known = (str(facts.train_problems), str(facts.vocabulary))
        for_joiners = (facts.task_digest, str(segment_path(self.folder.path)), self.weights_endpoint)
        self.spawn("buffer", "async_rl.buffer", path, endpoint, *known, version, *for_joiners)
        endpoint = self.settings.wire.connect or as_reached_from_here(endpoint)
        self.spawn(
            "trainer", *trainer_module(self.settings), path, endpoint, version,
            threads=self.settings.trainer.threads,
            environment={**facts.placement.trainer_environment(), WAYS: ",".join(sorted(set(facts.ways)))},
        )  # fmt: skip
        budgets = self.crew.budgets
        if self.weights_endpoint:
            budgets[WEIGHTS] = RestartBudget(max_restarts=chosen.max_restarts, window_s=chosen.restart_window_s)
            self.spawn(WEIGHTS, "async_rl.weights.stream", path, self.weights_endpoint)
        weights = as_reached_from_here(self.weights_endpoint)
        for i in range(chosen.count):
            name = f"generator-{i}"
            budgets[name] = RestartBudget(max_restarts=chosen.max_restarts, window_s=chosen.restart_window_s)
            self.held_back.append(
                Command(
                    name=name,
                    words=("async_rl.generator", path, endpoint, name, weights),
                    threads=chosen.threads,
                    environment={**facts.placement.generator_environment(i), WAYS: facts.ways[i]},
                )
            )
        self.start_generators()
        ends = {"parent_pipe": self.crew.pipe[0], "lock": self.lock}
        self.tracking = Tracking.start(self.folder, self.settings.trackers, int(version), **ends)

    def start_generators(self) -> None:
        """A trainer that somebody else starts may come late: generators begin when its weights are there."""
        if self.settings.trainer.start == "launcher" or segment_path(self.folder.path).exists():
            while self.held_back:
                self.crew.launch(self.held_back.pop(0))

    def spawn(
        self, name: str, *words: str, threads: int = 1, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.crew.launch(Command(name=name, words=words, threads=threads, environment=environment))

    # ------------------------------------------------------------------ watch

    def watch(self) -> None:
        """Until the trainer is done. Raises RunFailed when any process ends before its time, GoneBack."""
        done_at: float | None = None
        while self.crew.working:
            self.show()
            self.look()
            self.look_back()
            self.crew.check()
            self.crew.restart()
            self.start_generators()
            if done_at is None and self.crew.child("trainer").process.poll() == 0:
                done_at = time.monotonic()
            if done_at is not None and time.monotonic() - done_at > SETTLE_S:
                self.crew.live.shut_down("the trainer is done")  # should its last word have got lost
            if done_at is not None and time.monotonic() - done_at > self.patience():
                self.leave_behind()
                return
            time.sleep(POLL_S)
        self.show()
        self.look_back()
        self.crew.check()

    def patience(self) -> float:
        """How long the others may take when the trainer is done. A generator that was still starting hears of
        no end: nobody is left to tell it."""
        return SETTLE_S if self.crew.child("buffer").ended else FINISH_S

    def leave_behind(self) -> None:
        """The trainer is done and something goes on. Raises RunFailed when that is the buffer, whose store must
        be closed; generators are told to end."""
        alive = tuple(c.name for c in self.crew.children if not c.ended)
        self.folder.record(ProcessesLeft(processes=alive))
        self.crew.check()
        if not self.crew.child("buffer").ended:
            raise RunFailed(f"the buffer did not end within {FINISH_S:g} s after the trainer was done")

    def look(self) -> None:
        """Hear the children and the buffer; end the children that are frozen."""
        now = time.monotonic()
        self.crew.look(now)
        self.crew.live.look(now, self.crew.vitals.rows(now))
        self.tracking.look()

    def look_back(self) -> None:
        """Raises GoneBack when the trainer has ended for that."""
        if self.crew.child("trainer").process.poll() != 0 or self.folder.summary.exists():
            return
        back = read_rollback(self.folder)
        if back is not None and back.at > self.version:
            self.goes_on = True
            raise GoneBack

    def show(self) -> None:
        """Rows and evaluations that are new since last time."""
        for row in self.rows.new():
            self.console.step(row)
        for found in read_event_rows(self.events.new()):
            if found.event is not None:
                self.console.event(found.event)
                self.crew.live.hear(found.event)

    # -------------------------------------------------------------------- end

    def finish(self, seconds: float) -> dict[str, Any]:
        if not self.folder.summary.exists():
            raise RunFailed("the trainer ended without a summary; see its log")
        summary: dict[str, Any] = json.loads(self.folder.summary.read_text())
        summary["seconds_with_start"] = round(seconds, 3)
        replace_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        return summary

    def release(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def clean(self, endpoint: str) -> None:
        """What a killed process could not remove itself."""
        segment = segment_path(self.folder.path)
        for path in (segment, segment.with_name(f"{segment.name}.new")):
            path.unlink(missing_ok=True)
        for socket in (endpoint, ipc_endpoint(self.folder.path, "weights")):
            if socket.startswith("ipc://"):
                Path(socket.removeprefix("ipc://")).unlink(missing_ok=True)


def trainer_module(settings: Settings) -> tuple[str, ...]:
    """What the run's trainer process executes, with its first arguments."""
    if settings.trainer.start == "external":
        return ("async_rl.run.external",)
    ranks = settings.trainer.ranks
    return ("async_rl.run.agent", str(ranks)) if ranks > 1 else ("async_rl.trainer",)


def run_training(settings: Settings, path: Path, *, console: Console) -> Mapping[str, Any]:
    """Run `settings` in the new run folder `path`; the summary."""
    launcher = Launcher(settings, RunFolder(path), console)
    try:
        return _to_the_end(launcher)
    finally:
        launcher.release()


def resume_training(path: Path, overrides: Sequence[str], *, console: Console) -> Mapping[str, Any]:
    """Go on with the run in `path` from its newest whole checkpoint; the summary of the whole run."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"{path} is not a run folder: there is no {folder.config.name} in it")
    lock = take_lock(folder.lock, LAST_LAUNCH_S)
    try:
        settings = resumed_settings(folder, overrides)
        return _to_the_end(Launcher(settings, folder, console, start_at=find_start(folder, settings), lock=lock))
    finally:
        os.close(lock)


def _to_the_end(launcher: Launcher) -> Mapping[str, Any]:
    """A run that goes back begins there with new processes: none of them knows the weights that were given up."""
    settings, folder, console = launcher.settings, launcher.folder, launcher.console
    begun: list[int] = []
    while True:
        try:
            return launcher.run()
        except GoneBack:
            begun.append(launcher.version)
            start = start_of_rollback(folder, settings, begun)
            launcher = Launcher(settings, folder, console, start_at=start, lock=launcher.lock)
