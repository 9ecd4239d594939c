"""A real run, hurt at random moments and resumed as its user would.

Who waits for whom: this process waits for nobody. It polls the run's files and processes fifty times a second, sends
the signals that are due, and starts `async-rl run --resume` whenever the launcher has ended badly. The run knows
nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from async_rl.buffer.store import StoreReader, store_begun
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.chaos.evidence import StoreEvidence, take_evidence
from async_rl.instruments.chaos.injector import InjectedFault, Injector
from async_rl.instruments.chaos.launch import POLL_S, LaunchedRun
from async_rl.instruments.chaos.outcome import Outcome
from async_rl.instruments.chaos.plan import COUNTERS, describe
from async_rl.instruments.chaos.progress import RunProgress
from async_rl.process import ignore_interrupts, interruptible

HANG_S = 60.0
"""no progress for so long is a hang"""
MOST_RESUMES_IN_VAIN = 3
"""in a row, without a step, after ends that no fault explains"""
NOTED = (
    "started", "failed", "generator_died", "generator_rejoined", "process_frozen", "stall", "resumed",
    "checkpoint_damaged", "ended_by_force", "still_running", "trajectory_doubted", "generator_quarantined",
)  # fmt: skip
"""events that are kept with the fault they follow"""


@dataclass(slots=True, kw_only=True)
class ChaosRun:
    """One run from its start to its last resume."""

    run: LaunchedRun
    injector: Injector
    progress: RunProgress
    outcome: Outcome
    report: Callable[[str], None]
    """shows a line to the user"""
    expected_end: str = ""
    """the fault that is bound to end the present launch"""
    evidence: list[StoreEvidence] = field(default_factory=list)
    """what the store said at the end of each launch"""
    resumed_in_vain: int = 0
    """ends that no fault explains, since the last step"""

    def play(self, config: Path, overrides: Sequence[str]) -> None:
        """Start the run, and go on until it has ended well. Raises RunFailed when it cannot be brought there,
        Interrupted, UserError when it never began; no process is left then."""
        with interruptible():
            try:
                self.run.start(str(config), "--run-dir", str(self.run.folder.path), *overrides)
                while not self.ended_well():
                    self.watch()
                    self.inject()
                    time.sleep(POLL_S)
            finally:
                ignore_interrupts()
                self.end()

    def ended_well(self) -> bool:
        """Whether the run is done; resumes it when its launcher ended otherwise."""
        code = self.run.launcher.poll()
        if code is None:
            return False
        self.watch()
        folder, last_words = self.run.folder, self.run.last_words()
        if code == 0:
            if folder.summary.exists():
                return True
            raise RunFailed(f"the launcher reported success and there is no summary:\n{last_words}")
        never_began = code == 2 and self.outcome.resumes == 0 and self.injector.next == 0
        if not folder.config.is_file() or never_began:
            raise UserError(last_words.removeprefix("async-rl: "))
        self.check_end(code, last_words)
        if self.injector.frozen_for_good:
            self.injector.wake()
        self.outcome.resumes += 1
        if store_begun(folder.store):
            with StoreReader(folder.store) as store:
                self.evidence.append(take_evidence(store))
        self.expected_end = ""
        self.run.start("--resume", str(folder.path))
        return False

    def check_end(self, code: int, last_words: str) -> None:
        """The launcher ended badly: did a fault do that? Raises RunFailed after too many ends that none explains."""
        how = f"the launcher ended with {code}" if code > 0 else "the launcher is gone"
        self.injector.note(how + (f": {last_words}" if code > 0 else ""))
        if self.expected_end or "generator.max_restarts" in last_words:
            return
        self.problem(f"{how}, and nothing done to the run should have ended it: {last_words}")
        self.resumed_in_vain += 1
        if self.resumed_in_vain > MOST_RESUMES_IN_VAIN:
            raise RunFailed(f"resumed {MOST_RESUMES_IN_VAIN} times in a row without a step; last: {last_words}")

    def watch(self) -> None:
        """Read what the run has written, and end it when it has stood still for too long."""
        now = time.monotonic()
        stepped = self.progress.stepped_at
        for event in self.progress.poll(now):
            if event["event"] == "started":
                self.run.add(event["process"], event["pid"])
            if event["event"] in NOTED:
                what = event.get("name") or event.get("process") or event.get("version")
                self.injector.note(f"{event['event']}: {what}")
        if self.progress.stepped_at != stepped:
            self.resumed_in_vain = 0
            self.injector.stepped(now)
        if self.progress.stalled_s(now) > HANG_S:
            self.hang(now)

    def hang(self, now: float) -> None:
        """Nothing moved for too long: say who is there, and end everything; the run is then resumed."""
        living = [one for one in self.run.living.values() if one.alive()]
        there = [f"{t.name} ({t.pid}{', stopped' if t.stopped() else ''})" for t in living]
        stalled = self.progress.stalled_s(now)
        self.outcome.hangs += 1
        self.problem(f"no progress for {stalled:.0f} s after {self.progress.last}; alive: {there}")
        self.expected_end = "hang"
        self.run.kill_all()
        self.progress.moved_at = now  # the next hang is counted anew; this stall is recorded already

    def inject(self) -> None:
        if not self.run.folder.config.is_file():
            return
        living = list(self.run.living.values())
        begun = self.injector.poll(time.monotonic(), self.progress.steps_done, living)
        if begun is not None:
            self.count(begun)

    def count(self, begun: InjectedFault) -> None:
        fault, target = begun.fault, begun.target
        if (fault.kind in ("kill", "disk") or fault.endless) and fault.role != "generator":
            self.expected_end = describe(fault)
        counter = COUNTERS[fault.kind]
        setattr(self.outcome, counter, getattr(self.outcome, counter) + 1)
        self.report(
            f"{begun.began - self.injector.started:7.1f} s  step {begun.step:5d}  {describe(fault)}"
            + (f" ({target.name}, {target.pid})" if target is not None else "")
        )

    def problem(self, what: str) -> None:
        self.outcome.problems.append(what)
        self.report(f"WRONG: {what}")

    def end(self) -> None:
        """Leave nothing of the run. What a run that ended well has left over is a hang."""
        self.outcome.seconds = time.monotonic() - self.injector.started
        self.outcome.max_stall_seconds = self.progress.longest_stall_s
        self.outcome.stalled_where = self.progress.stalled_where
        if self.run.launcher.poll() is None:
            self.injector.wake()
            self.run.interrupt()
            self.watch()
        else:
            if left := self.run.remaining():
                self.outcome.hangs += 1
                self.problem(f"left over at the end: {', '.join(f'{t.name} ({t.pid})' for t in left)}")
            if undone := self.injector.undone:
                self.problem(f"the run ended before {undone} of {len(self.injector.plan)} faults; raise trainer.steps")
        self.injector.end_liars()
        self.run.kill_all()
        self.run.output.close()
        if self.run.folder.path.is_dir():
            self.injector.close()
