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

from async_rl.buffer.demonstrations import Shown, write_demonstrations
from async_rl.config import Settings
from async_rl.config.schema import to_yaml
from async_rl.config.sources import read_sources, sources_of, write_sources
from async_rl.errors import RunFailed, UserError
from async_rl.events import (
    CheckpointDamaged,
    GeneratorQuarantined,
    OutputLost,
    ProcessesLeft,
    ProcessStarted,
    RunInterrupted,
    RunResumed,
    TrackerFailed,
    read_event_rows,
)
from async_rl.objective import own
from async_rl.observe.answers import answers_before_and_after
from async_rl.observe.console import Console
from async_rl.process import Interrupted, further_signals, ignore_interrupts, interruptible, uninterrupted
from async_rl.process_spec import BufferSpec, GeneratorSpec, Pipes, TrackerSpec, TrainerSpec, WeightServerSpec
from async_rl.run.child import Command, describe_end, spawn
from async_rl.run.crew import POLL_S, SETTLE_S, Crew, RestartBudget
from async_rl.run.inputs import (
    Inputs,
    accept,
    as_changes,
    compare,
    in_directory_of,
    read_inputs,
    updated,
    write_inputs,
)
from async_rl.run.liveness import LiveReport, Vitals
from async_rl.run.placement import ANYWHERE
from async_rl.run.preflight import Facts, preflight, with_template_time
from async_rl.run.resume import ResumePoint, changed, find_start, resumed_settings, rewind, start_of_rollback
from async_rl.run_folder import RowTail, RunFolder, read_rollback, replace_text, take_lock
from async_rl.trainer.manifest import list_checkpoints, version_of
from async_rl.weights.shared_memory import segment_path
from async_rl.wire.channel import Dealer, Router, ipc_endpoint
from async_rl.wire.endpoint import as_reached_from_here, beside, is_tcp
from async_rl.wire.keys import keys_in

BUFFER, TRAINER, WEIGHTS, TRACKER = "buffer", "trainer", "weights", "tracker"
"""names of processes; generators are generator-0, generator-1, ..."""
FINISH_S = 15.0
"""time the others get after the trainer is done"""
TRACKER_FINISH_S = 10.0
"""time the tracker gets to send the rest when the run has ended"""
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
    start_at: ResumePoint | None = None
    """where a resumed run goes on; None: a new run"""
    crew: Crew = field(init=False)
    """the processes"""
    accepted: Sequence[str] = ()
    """kinds of inputs (run/inputs.py) that a resumed run may find changed"""
    lock: int = -1
    rows: RowTail = field(init=False)
    """metric rows not shown yet"""
    events: RowTail = field(init=False)
    weights_endpoint: str = ""
    """where the weight server listens; empty: there is none"""
    held_back: list[Command] = field(default_factory=list)
    """generators that are still to be started"""
    tracker: TrackerProcess = field(init=False)
    trained: int = 0
    """version behind the last step that was shown in this launch; 0: none was"""
    not_adapted: str = ""
    """what adapters leave out of the model, for the user"""
    output_lost: bool = False
    """nothing is shown any more, which has been recorded"""
    goes_on: bool = False
    """this launch ends for another one to follow"""

    def __post_init__(self) -> None:
        self.rows, self.events = RowTail(self.folder.metrics), RowTail(self.folder.events)
        self.tracker = TrackerProcess(self.folder)

    def run(self) -> dict[str, Any]:
        """The run's summary. Raises UserError, RunFailed, Interrupted or GoneBack; all processes are gone then."""
        with interruptible():
            return self._run()

    def _run(self) -> dict[str, Any]:
        facts = preflight(self.settings, resumed=self.start_at is not None)
        self.settings, self.not_adapted = facts.settings, facts.not_adapted
        endpoint = self.endpoint()
        self.open_folder(facts.inputs, facts.demonstrations)
        self.crew = Crew(
            self.folder,
            Vitals(self.settings.wire.frozen_after_s),
            LiveReport(self.dealer(endpoint), self.folder, self.settings),
            self.lock,
        )
        started = time.monotonic()
        try:
            placed = [where] if (where := facts.placement.describe()) != ANYWHERE else []
            self.console.start(self.settings, self.folder.path, placed + facts.notes)
            self.clean(endpoint)  # a launch before may have been killed: its weights must not be taken for ours
            self.start(endpoint, facts)
            self.watch()
            return self.finish(time.monotonic() - started)
        except Interrupted as order:
            self.save_before_end(order)
            self.folder.record(RunInterrupted(signal=str(order), version=newest_checkpoint(self.folder)))
            raise
        except UserError:
            self.end(endpoint)
            if self.start_at is None and not self.folder.metrics.exists():
                shutil.rmtree(self.folder.path, ignore_errors=True)  # a wrong set-up leaves nothing behind
            raise
        finally:
            self.end(endpoint)

    def save_before_end(self, order: Interrupted) -> None:
        """On a signal of `checkpoint.signals`: let the trainer finish its step and write a checkpoint, within
        `checkpoint.grace_s`. A further signal ends the wait."""
        chosen = self.settings.checkpoint
        self.show()  # steps may have ended since the last look
        snapshot = self.crew.live.snapshot
        in_hand = snapshot is not None and snapshot.step > self.version  # its first batch is with the trainer
        if str(order) not in chosen.signals or not (self.trained or in_hand):
            return
        self.console.print(
            f"{order}: finishing the step in hand and writing a checkpoint, within {chosen.grace_s:g} s "
            "(checkpoint.grace_s); another signal ends the run at once"
        )
        self.folder.ending.touch()
        deadline = time.monotonic() + chosen.grace_s
        try:
            with further_signals() as more:
                while not more and time.monotonic() < deadline and not self.saved_all():
                    self.crew.live.preempt(str(order))
                    self.crew.vitals.poll(time.monotonic())
                    self.show()
                    time.sleep(POLL_S)
        finally:
            self.folder.ending.unlink(missing_ok=True)

    def saved_all(self) -> bool:
        """Whether the trainer, told to write a checkpoint and end, has done so. The stand-in of a trainer that somebody
        else started does not end with it: there the rows tell."""
        if self.settings.trainer.start == "launcher":
            return self.crew.child(TRAINER).ended
        return newest_checkpoint(self.folder) == self.trained

    def end(self, endpoint: str) -> None:
        """End every process and remove what they leave. May be called twice."""
        if self.goes_on:
            with uninterrupted():  # a signal stops the run, as soon as this is done
                self.take_down(endpoint)
            return
        try:
            ignore_interrupts()
        finally:  # a signal that came just before is raised when all is done
            self.take_down(endpoint)

    def take_down(self, endpoint: str) -> None:
        self.crew.stop()
        self.tracker.finish()
        self.clean(endpoint)
        self.console.stop()

    def open_folder(self, inputs: Inputs, demonstrations: Sequence[Shown] = ()) -> None:
        """Make the folder of a new run, or put that of a resumed one into the state of its start. `inputs`: what this
        launch finds. Raises UserError where a resumed run would go on with other inputs."""
        if self.start_at is None:
            with self.folder.created(self.settings):
                own.record(self.folder.path, str(self.settings.recipe["name"]))
                sources = sources_of(self.settings)
                write_sources(self.folder.sources, sources)
                write_inputs(self.folder.inputs, inputs)
                if demonstrations:
                    write_demonstrations(self.folder.demonstrations, demonstrations)
                self.lock = take_lock(self.folder.lock, LAST_LAUNCH_S)
            for source in sources:
                self.console.print(str(source))
            return
        start = self.start_at
        changes = self.check_inputs(inputs)
        for damage in start.damaged:
            self.console.print(f"{damage.path.name} is damaged and left out: {damage.reason}")
            self.folder.record(CheckpointDamaged(path=str(damage.path), reason=damage.reason))
        rewind(self.folder, start)
        new = changed(self.folder, self.settings)
        replace_text(self.folder.config, to_yaml(self.settings))
        self.folder.record(RunResumed(version=start.version, changed={**new, **as_changes(changes)}))
        self.rows.skip()  # what earlier launches wrote is not shown again
        self.events.skip()
        self.console.print(f"resuming {self.folder.path} {start.describe()}")

    def check_inputs(self, inputs: Inputs) -> dict[str, tuple[str, str]]:
        """What has changed since the run began, all of it accepted. Raises UserError."""
        before, found = read_inputs(self.folder.inputs), sources_of(self.settings)
        changes = compare(before, inputs, read_sources(self.folder.sources), found)
        accept(changes, self.accepted, self.folder.path)
        for kind, (was, now) in changes.items():
            self.console.print(f"accepted: {kind} has changed since the run began: {was}; now {now}")
        write_sources(self.folder.sources, found)
        write_inputs(self.folder.inputs, updated(before, inputs))
        return changes

    @property
    def version(self) -> int:
        """Of the weights that this launch begins with."""
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
        """A socket to the buffer."""
        return Dealer(as_reached_from_here(endpoint), "launcher", keys=keys_in(self.settings.wire.keys))

    # ------------------------------------------------------------------ start

    def start(self, endpoint: str, facts: Facts) -> None:
        """Start every process of the run; generators perhaps later."""
        run, placement = str(self.folder.path), facts.placement
        buffer = BufferSpec(
            run=run,
            name=BUFFER,
            endpoint=endpoint,
            train_problems=facts.train_problems,
            vocabulary=facts.vocabulary,
            version=self.version,
            task_digest=facts.task_digest,
            segment=str(segment_path(self.folder.path)),
            weights_endpoint=self.weights_endpoint,
        )
        if facts.sources is not None:
            facts.sources.write(self.folder.problem_sources)
        self.spawn(Command(module=("async_rl.buffer",), spec=buffer))
        endpoint = self.settings.wire.connect or as_reached_from_here(endpoint)
        trainer = TrainerSpec(
            run=run,
            name=TRAINER,
            cores=placement.trainer_cores(),
            endpoint=endpoint,
            version=self.version,
            ways=tuple(sorted(set(facts.ways))),
            weights_endpoint=self.weights_endpoint if self.settings.trainer.start == "external" else "",
        )
        self.spawn(
            Command(
                module=trainer_module(self.settings),
                spec=trainer,
                threads=self.settings.trainer.threads,
                environment=placement.trainer_environment(),
            )
        )
        if self.weights_endpoint:
            self.crew.budgets[WEIGHTS] = self.budget()
            server = WeightServerSpec(run=run, name=WEIGHTS, endpoint=self.weights_endpoint)
            self.spawn(Command(module=("async_rl.weights.stream",), spec=server))
        for i in range(self.settings.generator.count):
            self.prepare_generator(i, endpoint, facts)
        self.start_generators()
        if self.settings.trackers:
            self.tracker.start(self.settings.trackers, self.version, parent_pipe=self.crew.pipe[0], lock=self.lock)

    def prepare_generator(self, number: int, endpoint: str, facts: Facts) -> None:
        """Put what starts generator `number` into `held_back`."""
        spec = GeneratorSpec(
            run=str(self.folder.path),
            name=f"generator-{number}",
            cores=facts.placement.generator_cores(number),
            endpoint=endpoint,
            weights_endpoint=as_reached_from_here(self.weights_endpoint),
            way=facts.ways[number],
        )
        self.crew.budgets[spec.name] = self.budget()
        self.held_back.append(
            Command(
                module=("async_rl.generator",),
                spec=spec,
                threads=self.settings.generator.threads,
                environment=facts.placement.generator_environment(number),
            )
        )

    def start_generators(self) -> None:
        """A trainer that somebody else starts may come late: generators begin when its weights are there."""
        if self.settings.trainer.start == "launcher" or segment_path(self.folder.path).exists():
            while self.held_back:
                self.crew.launch(self.held_back.pop(0))

    def budget(self) -> RestartBudget:
        chosen = self.settings.generator
        return RestartBudget(max_restarts=chosen.max_restarts, window_s=chosen.restart_window_s)

    def spawn(self, command: Command) -> None:
        self.crew.launch(command)

    # ------------------------------------------------------------------ watch

    def watch(self) -> None:
        """Until the trainer is done. Raises RunFailed when any process ends before its time, GoneBack."""
        done_at: float | None = None
        while self.crew.working:
            self.show()
            self.poll()
            self.check_rollback()
            self.crew.check()
            self.crew.restart()
            self.start_generators()
            if done_at is None and self.crew.child(TRAINER).process.poll() == 0:
                done_at = time.monotonic()
            if done_at is not None and time.monotonic() - done_at > SETTLE_S:
                self.crew.live.shut_down("the trainer is done")  # its own message may have been lost
            if done_at is not None and time.monotonic() - done_at > self.finish_s():
                self.leave_behind()
                return
            time.sleep(POLL_S)
        self.show()
        self.check_rollback()
        self.crew.check()

    def finish_s(self) -> float:
        """How long the others may take when the trainer is done. Where the buffer has ended already, a generator that
        was still starting is told nothing: there is nobody left to tell it."""
        return SETTLE_S if self.crew.child(BUFFER).ended else FINISH_S

    def leave_behind(self) -> None:
        """The trainer is done, and some processes have not ended in time. Raises RunFailed when the buffer is one of
        them, since its store must be closed; generators are ended."""
        alive = tuple(c.name for c in self.crew.children if not c.ended)
        self.folder.record(ProcessesLeft(processes=alive))
        self.crew.check()
        if not self.crew.child(BUFFER).ended:
            raise RunFailed(f"the buffer did not end within {FINISH_S:g} s after the trainer was done")

    def poll(self) -> None:
        """Take in pulses and the buffer's answer; end the children that are frozen."""
        now = time.monotonic()
        self.crew.poll(now)
        self.crew.live.update(now, self.crew.vitals.rows(now))
        self.tracker.poll()

    def check_rollback(self) -> None:
        """Raises GoneBack when the trainer has ended for that."""
        if self.crew.child(TRAINER).process.poll() != 0 or self.folder.summary.exists():
            return
        back = read_rollback(self.folder)
        if back is not None and back.at > self.version:
            self.goes_on = True
            raise GoneBack

    def show(self) -> None:
        """Rows and evaluations that are new since last time."""
        for row in self.rows.new():
            self.trained = int(row["step"]) + 1
            self.console.step(row)
        for found in read_event_rows(self.events.new()):
            if found.event is not None:
                self.console.event(found.event)
                self.crew.live.add_event(found.event)
                if isinstance(found.event, GeneratorQuarantined):
                    self.crew.quarantine(found.event)
        if self.console.lost and not self.output_lost:
            self.output_lost = True
            self.folder.record(OutputLost(reason=self.console.lost))

    # -------------------------------------------------------------------- end

    def finish(self, seconds: float) -> dict[str, Any]:
        if not self.folder.summary.exists():
            raise RunFailed("the trainer ended without a summary; see its log")
        summary: dict[str, Any] = json.loads(self.folder.summary.read_text())
        summary["seconds_with_start"] = round(seconds, 3)
        summary["not_adapted"] = self.not_adapted
        summary["answers"] = answers_before_and_after(self.folder, self.settings)
        replace_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        return summary

    def release(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def clean(self, endpoint: str) -> None:
        """Remove what a killed process could not remove itself: shared memory and sockets."""
        segment = segment_path(self.folder.path)
        for path in (segment, segment.with_name(f"{segment.name}.new")):
            path.unlink(missing_ok=True)
        for socket in (endpoint, ipc_endpoint(self.folder.path, "weights")):
            if socket.startswith("ipc://"):
                Path(socket.removeprefix("ipc://")).unlink(missing_ok=True)


def newest_checkpoint(folder: RunFolder) -> int:
    """Version of the newest checkpoint; 0: there is none, a resume begins at the initial model."""
    found = list_checkpoints(folder.checkpoints)
    return version_of(found[-1]) if found else 0


def trainer_module(settings: Settings) -> tuple[str, ...]:
    """What the run's trainer process executes."""
    if settings.trainer.start == "external":
        return ("async_rl.run.external",)
    return ("async_rl.run.agent",) if settings.trainer.ranks > 1 else ("async_rl.trainer",)


@dataclass(slots=True)
class TrackerProcess:
    """The process that sends metrics to trackers: started beside the run, never waited for while the run goes on."""

    folder: RunFolder
    process: subprocess.Popen[bytes] | None = None
    """None: there is none, or its end has been reported"""

    def start(self, names: Sequence[str], version: int, *, parent_pipe: int, lock: int) -> None:
        """`version`: where this launch begins; `parent_pipe`: the end that closes when the launcher is done or dies;
        `lock`: of the run, so that the next launch waits for the end of this one's tracker."""
        spec = TrackerSpec(
            run=str(self.folder.path),
            name=TRACKER,
            pipes=Pipes(parent=parent_pipe),
            version=version,
            trackers=tuple(names),
        )
        descriptors = (parent_pipe, lock)
        self.process = spawn(("async_rl.observe",), spec, self.folder, environment=os.environ, descriptors=descriptors)
        self.folder.record(ProcessStarted(process=TRACKER, pid=self.process.pid))

    def poll(self) -> None:
        """Report, once, that it has failed; the run goes on."""
        if self.process is None or self.process.poll() is None:
            return
        code, self.process = self.process.returncode, None
        if code != 0:
            self._report_failure(f"it {describe_end(code)}; see {self.folder.logs / 'tracker.log'}")

    def finish(self) -> None:
        """Wait a little for the rest to be sent, after the pipe has been closed."""
        if self.process is None:
            return
        try:
            self.process.wait(TRACKER_FINISH_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.process = None
            self._report_failure(
                f"it did not send everything within {TRACKER_FINISH_S:g} s after the end of the run, and was ended"
            )
        self.poll()

    def _report_failure(self, reason: str) -> None:
        with suppress(RunFailed):  # a full disk: others have reported that
            self.folder.record(TrackerFailed(name=TRACKER, reason=reason))


def run_training(settings: Settings, path: Path, *, console: Console) -> Mapping[str, Any]:
    """Run `settings` in the new run folder `path`; the summary."""
    launcher = Launcher(with_template_time(settings), RunFolder(path), console)
    try:
        return _to_the_end(launcher)
    finally:
        launcher.release()


def resume_training(
    path: Path, overrides: Sequence[str], *, console: Console, accepted: Sequence[str] = ()
) -> Mapping[str, Any]:
    """Go on with the run in `path` from its newest whole checkpoint; the summary of the whole run. `accepted`: kinds of
    inputs that may have changed. Relative paths of its settings begin where they did when the run was made."""
    folder = RunFolder.open(path)
    inputs = read_inputs(folder.inputs)
    if inputs is not None and inputs.directory:
        folder = RunFolder(path.absolute())
    lock = take_lock(folder.lock, LAST_LAUNCH_S)
    try:
        with in_directory_of(inputs):
            settings = with_template_time(resumed_settings(folder, overrides))
            start = find_start(folder, settings)
            return _to_the_end(Launcher(settings, folder, console, start_at=start, accepted=accepted, lock=lock))
    finally:
        os.close(lock)


def _to_the_end(launcher: Launcher) -> Mapping[str, Any]:
    """A run that goes back begins there with new processes: none of them knows the weights that were given up."""
    folder, console = launcher.folder, launcher.console
    begun: list[int] = []
    while True:
        try:
            return launcher.run()
        except GoneBack:
            begun.append(launcher.version)
            settings = launcher.settings
            start = start_of_rollback(folder, settings, begun)
            launcher = Launcher(settings, folder, console, start_at=start, lock=launcher.lock)
