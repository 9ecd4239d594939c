"""The processes that a run has now: started, polled, ended when they are frozen, started again, and why one ended.

Generators and the weight server may die and be started again, within their budgets; of the others the first that
ends badly ends the run. A trainer of several ranks is one child here, torch's elastic agent; the pulses of its ranks
are kept beside it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from async_rl.buffer.verification import LIVES, of_the_launcher
from async_rl.errors import RunFailed, UserError
from async_rl.events import (
    GeneratorDied,
    GeneratorGivenUp,
    GeneratorQuarantined,
    ProcessFrozen,
    ProcessKilled,
    ProcessStarted,
)
from async_rl.generator.step_mark import Marks
from async_rl.process import uninterrupted
from async_rl.process_spec import Pipes
from async_rl.run.blame import Blame, blame
from async_rl.run.child import Child, Command, ended_from_outside, start_child, terminate
from async_rl.run.liveness import LiveReport, Vitals, read_stacks, read_text
from async_rl.run_folder import RunFolder
from async_rl.wire.heartbeat import place_in_dump

FIRST_PAUSE_S = 0.5
"""before the first restart"""
LONGEST_PAUSE_S = 8.0
POLL_S = 0.1
STOP_S = 3.0
"""time children get to end by themselves after SIGTERM"""
HAND_OVER_S = 1.5
"""time generators get to hand over the finished turns of their episodes"""
SETTLE_S = 2.0
"""time a process gets to record why it ends, after another has ended without a cause"""
NO_ENDS = (-1, -1)


@dataclass(slots=True, kw_only=True)
class RestartBudget:
    """How often a process that dies is started again, and after which pause. It has no clock of its own."""

    max_restarts: int
    window_s: float
    """restarts are counted over this time"""
    causes: deque[tuple[float, str]] = field(default_factory=deque)
    """(time, cause) of the deaths within the window, oldest first"""

    def died(self, cause: str, now: float) -> float | None:
        """Seconds to wait before the next start: doubled with every death within the window. None when the
        budget is used up."""
        while self.causes and now - self.causes[0][0] > self.window_s:
            self.causes.popleft()
        self.causes.append((now, cause))
        if len(self.causes) > self.max_restarts:
            return None
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (len(self.causes) - 1))


class Lied(RunFailed):
    """A generator was proven to report what it did not do."""

    def __init__(self, found: GeneratorQuarantined) -> None:
        super().__init__(
            f"{found.name} is quarantined: it reported {found.lie} that are not what it did ({found.reason}); "
            "what to do then is in docs/explanations/verification.md"
        )


@dataclass(slots=True)
class Crew:
    """All children of one launch."""

    folder: RunFolder
    vitals: Vitals
    live: LiveReport
    lock: int
    """descriptor of the run's lock, which every child holds"""
    children: list[Child] = field(default_factory=list)
    pipe: tuple[int, int] = field(default_factory=os.pipe)
    """(read, write): children read an end of file when this process ends"""
    budgets: dict[str, RestartBudget] = field(default_factory=dict)
    """by name, of those that are started again"""
    resting: dict[str, tuple[float, Command]] = field(default_factory=dict)
    """by name, those that died: when they are started again (monotonic clock), and how"""
    frozen: dict[int, str] = field(default_factory=dict)
    """process number of those that were killed because they were silent, and what was known of each"""
    dumps: dict[int, str] = field(default_factory=dict)
    """process number of those, and the stacks of their threads, as far as they could be had"""
    lied: Counter[str] = field(default_factory=Counter)
    """proven lies by name of the generator"""
    excused_at: int = -1
    """trajectories that had arrived when the last death was excused: blamed on a problem, and not counted towards
    `generator.max_restarts`; -1: none was"""

    def launch(self, command: Command) -> None:
        """Start a child. Its own pipe for the cause is added by `start_child`."""
        pipes = Pipes(parent=self.pipe[0], pulse=self.vitals.ends[1])
        with uninterrupted():  # a process that was started must be in `children`, or nobody would end it
            child = start_child(command, self.folder, pipes=pipes, lock=self.lock)
            self.children.append(child)
        self.vitals.add(child.process.pid, child.name, time.monotonic())
        self.folder.record(ProcessStarted(process=child.name, pid=child.process.pid))

    def child(self, name: str) -> Child:
        return next(c for c in self.children if c.name == name)

    @property
    def working(self) -> bool:
        return any(not child.ended for child in self.children)

    # ------------------------------------------------------------------ watching

    def poll(self, now: float) -> None:
        """Take in the children's pulses, and kill those that are frozen. Raises the cause when the run cannot go on
        without one of them."""
        self.vitals.poll(now)
        for child in [c for c in self.children if c.ended]:
            self.vitals.remove(child.process.pid)
        for pid, why in self.vitals.frozen(now):
            state = self.vitals.states.get(pid)
            if state is None:
                continue  # removed with one before it in this list
            self._kill_frozen(pid, state.name, state.of or pid, why)

    def _kill_frozen(self, pid: int, name: str, child_pid: int, why: str) -> None:
        """`pid`: the frozen process, a child or a rank that the child `child_pid` started."""
        child = next(c for c in self.children if c.process.pid == child_pid)
        file = self.folder.stacks(name)
        dump = self.dumps[child_pid] = read_stacks(pid, file)
        if place := place_in_dump(dump):
            why = f"{why}; its code stands in {place} (stacks: {file})"
        self.vitals.remove(child_pid)
        self.frozen[child_pid] = f"{name} {why}"
        self.folder.record(ProcessFrozen(name=name, pid=pid, reason=why))
        if child_pid != pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.process.kill()  # no other signal ends a stopped process
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(STOP_S)
        if not child.ended and child.name not in self.budgets:
            raise self.cause(child)

    def check(self) -> None:
        """Handle the children that have ended. Raises RunFailed or UserError when trainer or buffer ended before their
        time, or a generator too often."""
        done = self.folder.summary.exists()
        for child in [c for c in self.children if c.ended and c.name in self.budgets and not done]:
            if child.process.returncode == 0:
                self.settle()  # the buffer told it to end: perhaps because the run fails
            self.schedule_restart(child)
        if failed := self.failed():
            time.sleep(POLL_S)  # others that fail at the same time get to record why
            raise self.first_cause(failed)
        ended = [c for c in self.children if c.ended and c.name not in self.budgets]
        if ended and not done and not self.child("trainer").ended:
            self.settle()
            raise RunFailed(f"{ended[0].name} ended before the trainer was done; see {ended[0].log}")

    def failed(self) -> list[Child]:
        """Those that ended badly and are not started again."""
        return [c for c in self.children if c.ended and c.process.returncode != 0 and c.name not in self.budgets]

    def settle(self) -> None:
        """Wait a little after a process has ended with code 0 before its time: another told it to end, and may still be
        recording why. Raises that cause."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            if failed := self.failed():
                raise self.first_cause(failed)
            time.sleep(POLL_S)

    def cause(self, child: Child) -> Exception:
        """Why it ended."""
        frozen = self.frozen.get(child.process.pid)
        return RunFailed(f"{frozen}; it was ended") if frozen is not None else child.cause()

    def first_cause(self, failed: Sequence[Child]) -> Exception:
        """Of several failures the earliest; a process killed from outside recorded none and comes first."""
        cause = self.cause(min(failed, key=lambda child: child.failed_at))
        if isinstance(cause, RunFailed) and self.resting:
            deaths = [f"{name} died: {self.budgets[name].causes[0][1]}" for name in self.resting]
            return RunFailed(f"{cause}; before that {'; '.join(deaths)}")
        return cause

    # ------------------------------------------------------------------ restarts

    def schedule_restart(self, child: Child) -> None:
        """A child with a budget died: it is started again after a pause, and the buffer gives its permits to others.
        Raises the cause when starting again cannot help or was done too often."""
        cause = self.lie(child) or self.cause(child)
        if isinstance(cause, UserError):
            raise cause
        if isinstance(cause, Lied):
            self.lied[child.name] += 1
            if self.lied[child.name] >= LIVES or not self.budgets[child.name].max_restarts:
                self.give_up(child, cause)
                return
        found = Blame() if isinstance(cause, Lied) else self.blamed(child)
        self.live.report_gone(child.name, child.process.pid, str(cause), groups=found.groups, place=found.place)
        budget = self.budgets[child.name]
        excused = bool(found.groups) and budget.max_restarts > 0 and self.live.arrived > self.excused_at
        self.excused_at = self.live.arrived if excused else self.excused_at
        pause = FIRST_PAUSE_S if excused else budget.died(str(cause), time.monotonic())
        if pause is None:
            raise RunFailed(
                f"{child.name} died {len(budget.causes)} times within {budget.window_s:g} s "
                f"(generator.max_restarts={budget.max_restarts}); the first cause: {budget.causes[0][1]}"
            )
        self._forget(child)
        self.folder.failure(child.name).unlink(missing_ok=True)
        self.resting[child.name] = (time.monotonic() + pause, child.command)
        self.folder.record(
            GeneratorDied(
                name=child.name,
                reason=str(cause),
                restart_in_s=pause,
                deaths=len(budget.causes),
                max_restarts=budget.max_restarts,
            )
        )

    def _forget(self, child: Child) -> None:
        """It has ended, perhaps since the last `poll`: nothing of it is watched any more."""
        self.children.remove(child)
        self.vitals.remove(child.process.pid)
        child.close()

    def lie(self, child: Child) -> Lied | None:
        """Why a child was quarantined; None: it was not."""
        for row in self.folder.read_events():
            match row.event:
                case GeneratorQuarantined(name=child.name, pid=child.process.pid) as found:
                    return Lied(found)
        return None

    def quarantine(self, found: GeneratorQuarantined) -> None:
        """End a generator of this launch that was proven to lie, if it does not end by itself."""
        for child in self.children:
            if (child.name, child.process.pid) == (found.name, found.pid) and not child.ended:
                child.process.kill()

    def give_up(self, child: Child, cause: Lied) -> None:
        """Go on without a generator. Raises the cause where there is no other."""
        others = [name for name in self.budgets if name != child.name and of_the_launcher(name)]
        snapshot = self.live.snapshot
        joined = [g.name for g in snapshot.generators if g.name not in self.budgets] if snapshot is not None else []
        if not others and not joined:
            raise cause
        self._forget(child)
        del self.budgets[child.name]
        self.folder.record(GeneratorGivenUp(name=child.name, reason=str(cause)))

    def blamed(self, child: Child) -> Blame:
        """Whose code ran when a generator crashed or froze; nobody's when somebody else ended the process."""
        pid = child.process.pid
        if ended_from_outside(child) and pid not in self.frozen:
            return Blame()
        marks = Marks.read(self.folder.step_mark(child.name))
        if pid in self.frozen:
            return blame(marks, frozen=self.dumps.get(pid, ""))
        crashed = child.process.returncode < 0
        stacks = read_text(self.folder.stacks(child.name)) if crashed else ""
        return blame(marks, stacks=stacks, recorded=bool(child.failure()))

    def restart(self) -> None:
        """Start those again whose pause is over."""
        for name, (due, command) in list(self.resting.items()):
            if time.monotonic() >= due and not self.folder.summary.exists():
                del self.resting[name]
                self.launch(command)

    # ------------------------------------------------------------------ the end

    def stop(self) -> None:
        """End every child: by SIGTERM, generators before the buffer, which takes what they hand over; then by SIGKILL.
        May be called twice."""
        alive = [c for c in self.children if not c.ended]
        terminate([c for c in alive if c.name in self.budgets], HAND_OVER_S)
        for child in terminate(alive, STOP_S):
            child.process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that even this does not end must not hold us up
                child.process.wait(STOP_S)
            with suppress(RunFailed):  # on a full disk the others are ended all the same
                self.folder.record(ProcessKilled(process=child.name))
        for child in self.children:
            child.close()
        if self.pipe == NO_ENDS:
            return
        for end in self.pipe:
            os.close(end)
        self.pipe = NO_ENDS
        self.live.write("ended", time.monotonic(), [])
        self.live.dealer.close(linger_s=0)
        self.vitals.close()
