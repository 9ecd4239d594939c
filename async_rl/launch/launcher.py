"""Start the processes of a run, watch them, show what happens, and leave nothing behind.

Who waits for whom: the launcher waits for its children and for nobody's messages; it reads the metric rows
the trainer writes. The first child that ends badly, or gives no sign of life, ends the run, with its reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.config import to_yaml
from async_rl.errors import RunFailed, UserError
from async_rl.interrupt import Interrupted, ignore_interrupts, interruptible, uninterrupted
from async_rl.launch.child import Child, Command, start_child, tell_to_end
from async_rl.launch.live import Live
from async_rl.launch.preflight import Facts, preflight
from async_rl.launch.restart import RestartBudget
from async_rl.launch.resume import Start, find_start, resumed_settings, rewind
from async_rl.launch.tracking import Tracking
from async_rl.launch.vitals import Vitals
from async_rl.observe.console import Console
from async_rl.run_folder import RowTail, RunFolder, replace_text
from async_rl.run_lock import take_lock
from async_rl.settings import Settings
from async_rl.weights.shared_memory import segment_path
from async_rl.wire.channel import Dealer, Router, ipc_endpoint
from async_rl.wire.endpoint import as_reached_from_here, beside, is_tcp
from async_rl.wire.keys import keys_in

WEIGHTS = "weights"
"""name of the weight server's process"""
POLL_S = 0.1
STOP_S = 3.0
"""time children get to end by themselves after being told to"""
HAND_OVER_S = 1.5
"""time generators get to hand over the finished turns of their episodes"""
FINISH_S = 15.0
"""time the others get after the trainer is done"""
SETTLE_S = 2.0
"""time a process gets to say why it ends after another has ended without a reason"""
LAST_LAUNCH_S = 15.0
"""time processes of a launch whose launcher was killed get to notice it"""


@dataclass(slots=True)
class Launcher:
    """One run from start to end."""

    settings: Settings
    folder: RunFolder
    console: Console
    start_at: Start | None = None
    """where a resumed run goes on; None: a new run"""
    children: list[Child] = field(default_factory=list)
    pipe: tuple[int, int] = (-1, -1)
    lock: int = -1
    rows: RowTail = field(init=False)
    """metric rows not shown yet"""
    events: RowTail = field(init=False)
    weights_endpoint: str = ""
    """where the weight server listens; empty: there is none"""
    budgets: dict[str, RestartBudget] = field(default_factory=dict)
    resting: dict[str, tuple[float, Command]] = field(default_factory=dict)
    """generators that died: when they are started again (monotonic clock), and how"""
    vitals: Vitals = field(init=False)
    live: Live = field(init=False)
    tracking: Tracking = field(init=False)
    frozen: dict[int, str] = field(default_factory=dict)
    """process number of those that were ended because nothing came of them, and what was known of each"""

    def __post_init__(self) -> None:
        self.rows, self.events = RowTail(self.folder.metrics), RowTail(self.folder.events)
        self.tracking = Tracking(self.folder)

    def run(self) -> dict[str, Any]:
        """The run's summary. Raises UserError, RunFailed or Interrupted; all processes are gone then."""
        with interruptible():
            return self._run()

    def _run(self) -> dict[str, Any]:
        facts = preflight(self.settings)
        endpoint = self.endpoint()
        self.open_folder()
        started = time.monotonic()
        try:
            self.console.start(self.settings, self.folder.path, facts.notes)
            self.clean(endpoint)  # of a launch before that was killed: its weights must not be taken for ours
            self.vitals = Vitals(self.settings.wire.frozen_after_s)
            self.live = Live(self.dealer(endpoint), self.folder, self.settings)
            self.pipe = os.pipe()
            self.start(endpoint, facts)
            self.watch()
            return self.finish(time.monotonic() - started)
        except Interrupted as order:
            self.folder.event("interrupted", signal=str(order), time=time.time())
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
        try:
            ignore_interrupts()
        finally:  # one that came just before is raised when all is done
            self.stop()
            self.tracking.finish()
            self.clean(endpoint)
            self.console.stop()

    def open_folder(self) -> None:
        """Make the folder of a new run, or put that of a resumed one into the state of its start."""
        if self.start_at is None:
            self.folder.create(self.settings)
            self.lock = take_lock(self.folder.lock, LAST_LAUNCH_S)
            return
        start = self.start_at
        for damage in start.damaged:
            self.console.say(f"{damage.path.name} is damaged and left out: {damage.reason}")
            self.folder.event("checkpoint_damaged", path=str(damage.path), reason=damage.reason, time=time.time())
        rewind(self.folder, start)
        replace_text(self.folder.config, to_yaml(self.settings))
        self.folder.event("resumed", version=start.version, time=time.time())
        self.rows.skip()  # what earlier launches wrote is not shown again
        self.events.skip()
        what = start.checkpoint.name if start.checkpoint is not None else "the initial model (no checkpoint yet)"
        self.console.say(f"resuming {self.folder.path} at step {start.version} from {what}")

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
        version = str(self.start_at.version if self.start_at is not None else 0)
        chosen = self.settings.generator
        known = (str(facts.train_problems), str(facts.vocabulary))
        for_joiners = (facts.task_digest, str(segment_path(self.folder.path)), self.weights_endpoint)
        self.spawn("buffer", "async_rl.buffer", path, endpoint, *known, version, *for_joiners)
        endpoint = self.settings.wire.connect or as_reached_from_here(endpoint)
        self.spawn("trainer", "async_rl.trainer", path, endpoint, version, threads=self.settings.trainer.threads)
        if self.weights_endpoint:
            self.budgets[WEIGHTS] = RestartBudget(max_restarts=chosen.max_restarts, window_s=chosen.restart_window_s)
            self.spawn(WEIGHTS, "async_rl.weights.server", path, self.weights_endpoint)
        for i in range(chosen.count):
            name = f"generator-{i}"
            self.budgets[name] = RestartBudget(max_restarts=chosen.max_restarts, window_s=chosen.restart_window_s)
            weights = as_reached_from_here(self.weights_endpoint)
            self.spawn(name, "async_rl.generator", path, endpoint, name, weights, threads=chosen.threads)
        ends = {"parent_pipe": self.pipe[0], "lock": self.lock}
        self.tracking = Tracking.start(self.folder, self.settings.trackers, int(version), **ends)

    def spawn(self, name: str, *words: str, threads: int = 1) -> None:
        self.launch(Command(name=name, words=words, threads=threads))

    def launch(self, command: Command) -> None:
        ends = {"parent_pipe": self.pipe[0], "pulse_pipe": self.vitals.ends[1], "lock": self.lock}
        with uninterrupted():  # a process that was started must be known, to be ended
            child = start_child(command, self.folder, **ends)
            self.children.append(child)
        self.vitals.began(child.process.pid, child.name, time.monotonic())
        self.folder.event("started", process=child.name, pid=child.process.pid, time=time.time())

    # ------------------------------------------------------------------ watch

    def watch(self) -> None:
        """Until the trainer is done. Raises RunFailed when any process ends before its time."""
        done_at: float | None = None
        while any(child.process.poll() is None for child in self.children):
            self.show()
            self.look()
            self.check()
            self.restart()
            if done_at is None and self.child("trainer").process.poll() == 0:
                done_at = time.monotonic()
            if done_at is not None and time.monotonic() - done_at > SETTLE_S:
                self.live.shut_down("the trainer is done")  # should its last word have got lost
            if done_at is not None and time.monotonic() - done_at > self.patience():
                self.leave_behind()
                return
            time.sleep(POLL_S)
        self.show()
        self.check()

    def check(self) -> None:
        """Raises RunFailed when trainer or buffer ended before their time, or a generator too often."""
        done = self.folder.summary.exists()
        for child in [c for c in self.children if c.ended and c.name in self.budgets and not done]:
            if child.process.returncode == 0:
                self.settle()  # the buffer told it to
            self.bury(child)
        if bad := self.fallen():
            time.sleep(POLL_S)  # those that fell with the first one get to say so
            raise self.first_cause(bad)
        ended = [c for c in self.children if c.ended and c.name not in self.budgets]
        if ended and not done and not self.child("trainer").ended:
            self.settle()
            raise RunFailed(f"{ended[0].name} ended before the trainer was done; see {ended[0].log}")

    def fallen(self) -> list[Child]:
        """Those that ended badly and are not started again."""
        return [c for c in self.children if c.ended and c.process.returncode != 0 and c.name not in self.budgets]

    def patience(self) -> float:
        """How long the others may take when the trainer is done. A generator that was still starting hears of
        no end: nobody is left to tell it."""
        return SETTLE_S if self.child("buffer").ended else FINISH_S

    def leave_behind(self) -> None:
        """The trainer is done and something goes on. Raises RunFailed when that is the buffer, whose store must
        be closed; generators are told to end."""
        alive = [c.name for c in self.children if not c.ended]
        self.folder.event("still_running", processes=alive, time=time.time())
        self.check()
        if not self.child("buffer").ended:
            raise RunFailed(f"the buffer did not end within {FINISH_S:g} s after the trainer was done")

    def look(self) -> None:
        """Hear the children and the buffer; end the children that are frozen."""
        now = time.monotonic()
        self.vitals.look(now)
        for child in [c for c in self.children if c.ended]:
            self.vitals.ended(child.process.pid)
        for pid, why in self.vitals.frozen(now):
            child = next(c for c in self.children if c.process.pid == pid)
            self.vitals.ended(pid)
            self.frozen[pid] = f"{child.name} {why}"
            self.folder.event("process_frozen", name=child.name, pid=pid, reason=why, time=time.time())
            child.process.kill()  # nothing else reaches a stopped process
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(STOP_S)
            if not child.ended and child.name not in self.budgets:
                raise self.cause(child)
        self.live.look(now, self.vitals.rows(now))
        self.tracking.look()

    def cause(self, child: Child) -> Exception:
        """Why it ended, in words."""
        frozen = self.frozen.get(child.process.pid)
        return RunFailed(f"{frozen}; it was ended") if frozen is not None else child.cause()

    def settle(self) -> None:
        """A process has ended in peace, because another told it to that is still writing down why. Raises that
        cause."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            if bad := self.fallen():
                raise self.first_cause(bad)
            time.sleep(POLL_S)

    def bury(self, child: Child) -> None:
        """A generator died: it is started again after a pause. The buffer gives its permits to it anew, or to
        others. Raises the cause when starting again cannot help or was done too often."""
        cause = self.cause(child)
        if isinstance(cause, UserError):
            raise cause
        self.live.gone(child.name, child.process.pid, str(cause))
        budget = self.budgets[child.name]
        pause = budget.died(str(cause), time.monotonic())
        if pause is None:
            raise RunFailed(
                f"{child.name} died {len(budget.causes)} times within {budget.window_s:g} s "
                f"(generator.max_restarts={budget.max_restarts}); the first cause: {budget.causes[0][1]}"
            )
        self.children.remove(child)
        child.close()
        self.folder.failure(child.name).unlink(missing_ok=True)
        self.resting[child.name] = (time.monotonic() + pause, child.command)
        self.folder.event(
            "generator_died",
            name=child.name,
            reason=str(cause),
            restart_in_s=pause,
            deaths=len(budget.causes),
            max_restarts=budget.max_restarts,
            time=time.time(),
        )

    def restart(self) -> None:
        """Start the generators whose pause is over."""
        for name, (due, command) in list(self.resting.items()):
            if time.monotonic() >= due and not self.folder.summary.exists():
                del self.resting[name]
                self.launch(command)

    def first_cause(self, bad: Sequence[Child]) -> Exception:
        """Of several failures the earliest; a process killed from outside recorded none and comes first."""
        cause = self.cause(min(bad, key=lambda child: child.failed_at))
        if isinstance(cause, RunFailed) and self.resting:
            deaths = [f"{name} died: {self.budgets[name].causes[0][1]}" for name in self.resting]
            return RunFailed(f"{cause}; before that {'; '.join(deaths)}")
        return cause

    def child(self, name: str) -> Child:
        return next(c for c in self.children if c.name == name)

    def show(self) -> None:
        """Rows and evaluations that are new since last time."""
        for row in self.rows.new():
            self.console.step(row)
        for event in self.events.new():
            self.console.event(event)

    # -------------------------------------------------------------------- end

    def finish(self, seconds: float) -> dict[str, Any]:
        if not self.folder.summary.exists():
            raise RunFailed("the trainer ended without a summary; see its log")
        summary: dict[str, Any] = json.loads(self.folder.summary.read_text())
        summary["seconds_with_start"] = round(seconds, 3)
        replace_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        return summary

    def stop(self) -> None:
        """End every child, kindly first; generators before the buffer, which takes what they hand over."""
        alive = [c for c in self.children if not c.ended]
        tell_to_end([c for c in alive if c.name in self.budgets], HAND_OVER_S)
        for child in tell_to_end(alive, STOP_S):
            child.process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that even this does not end must not hold us up
                child.process.wait(STOP_S)
            with suppress(RunFailed):  # on a full disk the others are ended all the same
                self.folder.event("ended_by_force", process=child.name, time=time.time())
        for child in self.children:
            child.close()
        if self.pipe == (-1, -1):
            return
        for end in self.pipe:
            os.close(end)
        self.pipe = (-1, -1)
        now = time.monotonic()
        self.live.write("ended", now, [])
        self.live.dealer.close(linger_s=0)
        self.vitals.close()

    def release(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def clean(self, endpoint: str) -> None:
        """What a killed process could not remove itself."""
        segment = segment_path(self.folder.path)
        for path in (segment, segment.with_name(f"{segment.name}.new")):
            path.unlink(missing_ok=True)
        if endpoint.startswith("ipc://"):
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


def run_training(settings: Settings, path: Path, *, console: Console) -> Mapping[str, Any]:
    """Run `settings` in the new run folder `path`; the summary."""
    launcher = Launcher(settings, RunFolder(path), console)
    try:
        return launcher.run()
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
        return Launcher(settings, folder, console, start_at=find_start(folder, settings), lock=lock).run()
    finally:
        os.close(lock)
