"""A real run, hurt at random moments and resumed as its user would, then audited.

Who waits for whom: this process waits for nobody. It looks at the run's files and processes fifty times a
second, sends the signals that are due, and starts `async-rl run --resume` whenever the launcher has ended
badly. The run knows nothing of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL
from typing import IO, Any

from async_rl.buffer.store import StoreReader, store_begun
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.chaos.plan import Fault, in_words, timetable
from async_rl.instruments.chaos.proxy import Proxy
from async_rl.instruments.chaos.watch import Memory, Outcome, Watch, remember
from async_rl.process import ignore_interrupts, interruptible
from async_rl.run_folder import RunFolder, append_row

# -------------------- target
# The processes of a run as seen from outside, and signals that reach nobody else.
#
# A number of a process may be given to another one when it ends. So a process is known by its number, the
# moment of its birth and its command, and is signalled through a descriptor that belongs to it alone (Linux).


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


POLL_S = 0.02
HANG_S = 60.0
"""no progress for so long is a hang"""
LEFT_S = 5.0
"""time processes get to be gone after their launcher"""
PATIENCE_S = 4.0
"""after which its user kills a launcher that is frozen"""
MOST_RESUMES_IN_VAIN = 3
"""in a row, without a step, after ends that no fault explains"""
TOLD_TO_STOP_S = 10.0
FOLLOWED_S = 3.0
"""what happens so long after a fault counts as its consequence, and until the next step"""
NOTED = (
    "started", "failed", "generator_died", "generator_rejoined", "process_frozen", "stall", "resumed",
    "checkpoint_damaged", "ended_by_force", "still_running",
)  # fmt: skip
"""events that are kept with the fault they follow"""


@dataclass(slots=True, kw_only=True)
class Strike:
    """A fault that has begun."""

    fault: Fault
    target: Target | None
    began: float
    step: int
    """done then"""
    ahead: deque[tuple[float, Any]]
    """(when, signal) still to come"""
    cut: Callable[[], int] | None = None
    """cuts the connections that are held"""
    followed: list[str] = field(default_factory=list)
    next_step_s: float | None = None
    """from its beginning to the next training step"""

    def advance(self, now: float) -> bool:
        """Do what is due; True when it is over."""
        while self.ahead and now >= self.ahead[0][0]:
            number = self.ahead.popleft()[1]
            if self.target is not None and not self.target.send(number):
                self.ahead.clear()
                if self.fault.kind != "kill":
                    self.followed.append("it ended meanwhile")
        if self.cut is not None and now >= self.began + self.fault.seconds:
            self.followed.append(f"{self.cut()} connections cut")
            self.cut = None
        if self.fault.endless and self.target is not None:
            return not self.target.alive()
        return not self.ahead and self.cut is None


@dataclass(slots=True, kw_only=True)
class ChaosRun:
    """One run from its start to its last resume."""

    config: Path
    overrides: Sequence[str]
    folder: RunFolder
    plan: Sequence[Fault]
    steps: int
    """of the run"""
    outcome: Outcome
    proxy: Proxy | None
    say: Callable[[str], None]
    watch: Watch = field(init=False)
    launcher: subprocess.Popen[bytes] = field(init=False)
    output: IO[bytes] = field(init=False)
    started: float = field(init=False)
    living: dict[str, Target] = field(default_factory=dict)
    """newest process of each name in the present launch"""
    seen: dict[int, Target] = field(default_factory=dict)
    """every process of the run there ever was"""
    next: int = 0
    """place in the plan"""
    due: float | None = None
    """when the next fault comes; None: its step has not come"""
    active: list[Strike] = field(default_factory=list)
    """begun and not over"""
    open: list[Strike] = field(default_factory=list)
    """over, but the run has not stepped since"""
    end_expected: str = ""
    """the fault that is bound to end this launch"""
    memories: list[Memory] = field(default_factory=list)
    """what the store said at the end of each launch"""
    in_vain: int = 0
    """ends that no fault explains, since the last step"""

    def run(self) -> None:
        """Until the run has ended well. Raises RunFailed when it cannot be brought there, Interrupted,
        UserError when it never began; no process is left then."""
        self.started = time.monotonic()
        self.watch = Watch(self.folder, self.started)
        words = [str(self.config), "--run-dir", str(self.folder.path), *self.overrides]
        with interruptible():
            try:
                self.launch(*words)
                while not self.ended_well():
                    self.look()
                    self.hurt()
                    time.sleep(POLL_S)
            finally:
                ignore_interrupts()
                self.end()

    # ------------------------------------------------------------------------------------------ the launcher

    def launch(self, *words: str) -> None:
        """As from a shell."""
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  # read and closed when the launcher has ended
        self.launcher = subprocess.Popen(
            [sys.executable, "-m", "async_rl", "run", *words],
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches chaos alone, which ends the run in its own way
        )
        self.living.clear()
        self.end_expected = ""
        if (target := launcher_target(self.launcher.pid)) is not None:
            self.living["launcher"] = self.seen[target.pid] = target

    def ended_well(self) -> bool:
        """Whether the run is done; resumes it when its launcher ended otherwise."""
        code = self.launcher.poll()
        if code is None:
            return False
        self.look()
        said = self.last_words()
        if code == 0:
            if self.folder.summary.exists():
                return True
            raise RunFailed(f"the launcher reported success and there is no summary:\n{said}")
        if not self.folder.config.is_file() or (code == 2 and self.outcome.resumes == 0 and self.next == 0):
            raise UserError(said.removeprefix("async-rl: "))
        how = f"the launcher ended with {code}" if code > 0 else "the launcher is gone"
        self.note(how + (f": {said}" if code > 0 else ""))
        if not self.end_expected and "generator.max_restarts" not in said:
            self.problem(f"{how}, and nothing done to the run should have ended it: {said}")
            self.in_vain += 1
            if self.in_vain > MOST_RESUMES_IN_VAIN:
                raise RunFailed(f"resumed {MOST_RESUMES_IN_VAIN} times in a row without a step; last: {said}")
        if any(strike.fault.endless for strike in self.active):
            self.free_frozen()
        self.outcome.resumes += 1
        if store_begun(self.folder.store):
            with StoreReader(self.folder.store) as store:
                self.memories.append(remember(store))
        self.launch("--resume", str(self.folder.path))
        return False

    def last_words(self) -> str:
        """What the launcher wrote last; all of it goes to the run's logs."""
        self.output.seek(0)
        written = self.output.read()
        self.output.close()
        if self.folder.logs.is_dir():
            with (self.folder.logs / "launcher.log").open("ab") as log:
                log.write(written)
        lines = written.decode(errors="replace").strip().splitlines()
        told = [place for place, line in enumerate(lines) if line.startswith("async-rl: ")]
        last = lines[told[-1] :] if told else lines[-3:]
        return "\n".join(line for line in last if not line.startswith("`async-rl run --resume"))

    # ------------------------------------------------------------------------------------------------ watching

    def look(self) -> None:
        now = time.monotonic()
        stepped = self.watch.stepped_at
        for event in self.watch.look(now):
            if event["event"] == "started":
                target = child_target(self.folder, event["process"], event["pid"])
                if target is not None:
                    self.living[target.name] = self.seen[target.pid] = target
            if event["event"] in NOTED:
                self.note(f"{event['event']}: {event.get('name') or event.get('process') or event.get('version')}")
        if self.watch.stepped_at != stepped:
            self.in_vain = 0
            self.close(now)
        if self.watch.stalled_s(now) > HANG_S:
            self.hang(now)

    def hang(self, now: float) -> None:
        """Nothing moved for too long: say who is there, end everything, and resume."""
        there = [f"{t.name} ({t.pid}{', stopped' if t.stopped() else ''})" for t in self.living.values() if t.alive()]
        self.outcome.hangs += 1
        self.problem(f"no progress for {self.watch.stalled_s(now):.0f} s after {self.watch.last}; alive: {there}")
        self.end_expected = "hang"
        self.kill_all()
        self.watch.moved_at = now  # the next one is counted anew; the stall is recorded already

    def note(self, what: str) -> None:
        """To every fault the run has not stepped on from."""
        for strike in (*self.open, *self.active):
            strike.followed.append(what)

    def problem(self, what: str) -> None:
        self.outcome.problems.append(what)
        self.say(f"WRONG: {what}")

    # ------------------------------------------------------------------------------------------------- hurting

    def hurt(self) -> None:
        """Go on with the faults that are going on, begin the next one when it is due."""
        now = time.monotonic()
        for strike in [strike for strike in self.active if strike.advance(now)]:
            self.active.remove(strike)
            self.open.append(strike)
        if self.next == len(self.plan) or not self.folder.config.is_file():
            return
        fault = self.plan[self.next]
        done = self.watch.steps_done / self.steps
        if self.due is None and (fault.follows or done >= fault.progress):
            self.due = now + fault.delay_s
        if self.active and (fault.endless or any(strike.fault.endless for strike in self.active)):
            return  # whoever is frozen for ever must not be woken, nor left without anybody who notices
        in_time = done < (fault.progress + 1.0) / 2.0  # else the run is so fast that it would end before
        if self.due is not None and (now >= self.due or not in_time):
            self.begin(fault, now)

    def begin(self, fault: Fault, now: float) -> None:
        """Unless nobody of that role lives at the moment: then it comes a little later."""
        target: Target | None = None
        cut: Callable[[], int] | None = None
        if fault.role is not None:
            living = [t for t in self.living.values() if t.role == fault.role and t.alive()]
            if not living:
                return
            target = living[int(fault.pick * len(living))]
        else:
            assert self.proxy is not None
            if not self.proxy.connections:
                return
            cut = self.proxy.hold(fault.pick)
        times = timetable(fault, patience_s=PATIENCE_S)
        strike = Strike(
            fault=fault,
            target=target,
            began=now,
            step=self.watch.steps_done,
            ahead=deque((now + seconds, number) for seconds, number in times),
            cut=cut,
        )
        if (fault.kind == "kill" or fault.endless) and fault.role != "generator":
            self.end_expected = in_words(fault)
        name = {"kill": "kills", "freeze": "freezes", "slow": "slows", "disconnect": "disconnects"}[fault.kind]
        setattr(self.outcome, name, getattr(self.outcome, name) + 1)
        self.say(
            f"{now - self.started:7.1f} s  step {self.watch.steps_done:5d}  {in_words(fault)}"
            + (f" ({target.name}, {target.pid})" if target is not None else "")
        )
        self.next += 1
        self.due = None
        if strike.advance(now):
            self.open.append(strike)
        else:
            self.active.append(strike)

    def close(self, now: float) -> None:
        """The run has stepped: what followed on the faults that are some time ago is known."""
        for strike in list(self.open):
            if strike.next_step_s is None:
                strike.next_step_s = now - strike.began
            if now - strike.began > FOLLOWED_S:
                self.record(strike)
                self.open.remove(strike)

    def record(self, strike: Strike) -> None:
        fault = strike.fault
        row = {
            "fault": fault.kind,
            "what": in_words(fault),
            "target": strike.target.name if strike.target is not None else "connections",
            "pid": strike.target.pid if strike.target is not None else None,
            "at_s": round(strike.began - self.started, 3),
            "step": strike.step,
            "planned_progress": round(fault.progress, 4),
            "follows_the_one_before": fault.follows,
            "followed": strike.followed or ["nothing"],
            "next_step_after_s": strike.next_step_s and round(strike.next_step_s, 3),
        }
        append_row(self.folder.path / "chaos.jsonl", row)

    # --------------------------------------------------------------------------------------------------- ending

    def end(self) -> None:
        """Nothing of the run is left. What was left of one that ended well is a hang."""
        now = time.monotonic()
        self.outcome.seconds = now - self.started
        self.outcome.max_stall_seconds = self.watch.longest_stall_s
        self.outcome.stalled_where = self.watch.stalled_where
        if self.launcher.poll() is None:
            self.free_frozen()
            self.launcher.send_signal(SIGCONT)
            self.launcher.send_signal(SIGINT)
            self._wait_for_launcher(TOLD_TO_STOP_S)
            self.look()
        else:
            left = self.remaining(LEFT_S)
            if left:
                self.outcome.hangs += 1
                self.problem(f"left over at the end: {', '.join(f'{t.name} ({t.pid})' for t in left)}")
            undone = len(self.plan) - self.next
            if undone:
                self.problem(f"the run ended before {undone} of {len(self.plan)} faults; raise trainer.steps")
        self.kill_all()
        self.output.close()
        if self.folder.path.is_dir():
            for strike in (*self.open, *self.active):
                self.record(strike)

    def remaining(self, seconds: float) -> list[Target]:
        """Processes of the run that are still there after so long."""
        deadline = time.monotonic() + seconds
        while left := [target for target in self.seen.values() if target.alive()]:
            if time.monotonic() > deadline:
                return left
            time.sleep(POLL_S)
        return []

    def free_frozen(self) -> None:
        """Those that chaos itself has stopped go on."""
        for strike in self.active:
            if strike.target is not None:
                strike.target.send(SIGCONT)
                strike.ahead.clear()

    def kill_all(self) -> None:
        for target in self.seen.values():
            target.send(SIGKILL)
        self._wait_for_launcher(LEFT_S)

    def _wait_for_launcher(self, seconds: float) -> None:
        try:
            self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(self.launcher.pid, SIGKILL)
            self.launcher.wait()
