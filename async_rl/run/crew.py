"""The processes a run has now: started, heard, ended when they are frozen, started again, and why one ended.

Generators and the weight server may die and come back, within their budgets; of the others the first that ends
badly ends the run. A trainer of several ranks is one child here, torch's elastic agent; its ranks are heard
beside it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from async_rl.errors import RunFailed, UserError
from async_rl.events import GeneratorDied, ProcessFrozen, ProcessKilled, ProcessStarted
from async_rl.process import uninterrupted
from async_rl.run.child import Child, Command, start_child, tell_to_end
from async_rl.run.liveness import Live, Vitals
from async_rl.run_folder import RunFolder

# -------------------- restart
# How often a process that dies is started again, and after which pause. No clock of its own.

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0


@dataclass(slots=True, kw_only=True)
class RestartBudget:
    """For one process."""

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


POLL_S = 0.1
STOP_S = 3.0
"""time children get to end by themselves after being told to"""
HAND_OVER_S = 1.5
"""time generators get to hand over the finished turns of their episodes"""
SETTLE_S = 2.0
"""time a process gets to say why it ends after another has ended without a reason"""


@dataclass(slots=True)
class Crew:
    folder: RunFolder
    vitals: Vitals
    live: Live
    lock: int
    """of the run, kept until the last process is gone"""
    children: list[Child] = field(default_factory=list)
    pipe: tuple[int, int] = field(default_factory=os.pipe)
    """closes when this process ends, and so tells its children"""
    budgets: dict[str, RestartBudget] = field(default_factory=dict)
    """of those that are started again"""
    resting: dict[str, tuple[float, Command]] = field(default_factory=dict)
    """those that died: when they are started again (monotonic clock), and how"""
    frozen: dict[int, str] = field(default_factory=dict)
    """process number of those that were ended because nothing came of them, and what was known of each"""

    def launch(self, command: Command) -> None:
        ends = {"parent_pipe": self.pipe[0], "pulse_pipe": self.vitals.ends[1], "lock": self.lock}
        with uninterrupted():  # a process that was started must be known, to be ended
            child = start_child(command, self.folder, **ends)
            self.children.append(child)
        self.vitals.began(child.process.pid, child.name, time.monotonic())
        self.folder.record(ProcessStarted(process=child.name, pid=child.process.pid))

    def child(self, name: str) -> Child:
        return next(c for c in self.children if c.name == name)

    @property
    def working(self) -> bool:
        return any(not child.ended for child in self.children)

    # ----------------------------------------------------------------- ends

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

    def look(self, now: float) -> None:
        """Hear the children; end those that are frozen. Raises the cause when no run goes on without them."""
        self.vitals.look(now)
        for child in [c for c in self.children if c.ended]:
            self.vitals.ended(child.process.pid)
        for pid, why in self.vitals.frozen(now):
            sign = self.vitals.signs.get(pid)
            if sign is None:
                continue  # ended with one before it in this list
            name, of = sign.name, sign.of or pid
            child = next(c for c in self.children if c.process.pid == of)
            self.vitals.ended(of)
            self.frozen[of] = f"{name} {why}"
            self.folder.record(ProcessFrozen(name=name, pid=pid, reason=why))
            if of != pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            child.process.kill()  # nothing else reaches a stopped process
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(STOP_S)
            if not child.ended and child.name not in self.budgets:
                raise self.cause(child)

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
        self.folder.record(
            GeneratorDied(
                name=child.name,
                reason=str(cause),
                restart_in_s=pause,
                deaths=len(budget.causes),
                max_restarts=budget.max_restarts,
            )
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

    def stop(self) -> None:
        """End every child, kindly first; generators before the buffer, which takes what they hand over. May be
        called twice."""
        alive = [c for c in self.children if not c.ended]
        tell_to_end([c for c in alive if c.name in self.budgets], HAND_OVER_S)
        for child in tell_to_end(alive, STOP_S):
            child.process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that even this does not end must not hold us up
                child.process.wait(STOP_S)
            with suppress(RunFailed):  # on a full disk the others are ended all the same
                self.folder.record(ProcessKilled(process=child.name))
        for child in self.children:
            child.close()
        if self.pipe == (-1, -1):
            return
        for end in self.pipe:
            os.close(end)
        self.pipe = (-1, -1)
        self.live.write("ended", time.monotonic(), [])
        self.live.dealer.close(linger_s=0)
        self.vitals.close()
