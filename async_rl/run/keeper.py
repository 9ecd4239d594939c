"""The process beside a generator that joined a run (`Keeper`): it tells the run's buffer how that ended.

What the launcher does for its own generators nobody does for one that a user starts. So `async-rl generate` stays a
small process, which starts another one that generates. Where code of a task crashes that one, ends it by `os._exit` or
holds it up for ever, the keeper reads whose code it was from its marks and where it stood from its stacks, and tells
the buffer: a problem that does so again and again is refused (buffer/poison.py).

Who waits for whom: nobody for the keeper; the keeper for the process that it started.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from async_rl.generator.step_mark import Marks
from async_rl.process import SIGNALS, state_of
from async_rl.run.blame import Blame, blame
from async_rl.run.child import KILLED_FOR_MEMORY, describe_end, memory_kills
from async_rl.run.join import JoinTarget, Traces
from async_rl.run.liveness import Vitals, read_stacks, read_text
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer
from async_rl.wire.heartbeat import place_in_dump

POLL_S = 0.1
SEND_S = 3.0
"""time the message has to leave"""
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""signals of somebody else"""
STOPPED = ("T", "t", "")
"""states of a process that somebody has stopped (SIGSTOP, Ctrl-Z), or that is gone"""
DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)"""
LEFT = 0
"""exit code of a generator that the buffer told to end"""


@dataclass(slots=True, kw_only=True)
class Keeper:
    """Watches one generator."""

    target: JoinTarget
    name: str
    identity: str
    """of the generator's socket"""
    frozen_after_s: float
    """silence after which a process is taken for frozen"""
    vitals: Vitals = field(init=False)
    place: Path = field(init=False)
    """folder of what the process leaves"""
    pid: int = 0
    kills_before: int | None = None
    stacks: str | None = None
    """of the process, where it was ended because it was frozen; None: it was not"""
    silence: str = ""
    """that, in words"""

    def run(self, generate: Callable[[Traces], int]) -> int:
        """Run `generate` in a process of its own, to its end. A signal for this process goes to that one. Returns its
        exit code."""
        self.vitals = Vitals(self.frozen_after_s)
        self.place = Path(tempfile.mkdtemp(prefix="async-rl-generator-"))
        self.kills_before = memory_kills()
        try:
            traces = Traces(marks=self.place / "marks", stacks=self.place / "stacks", pulse=self.vitals.ends[1])
            before = self._fork(lambda: generate(traces))
            self.vitals.add(self.pid, self.name, time.monotonic())
            try:
                code = self._wait(traces)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
            return self._ended(code, self._blamed(code, traces))
        finally:
            self.vitals.close()
            shutil.rmtree(self.place, ignore_errors=True)

    def _fork(self, work: Callable[[], int]) -> dict[int, Any]:
        """Start the process. Returns the handlers of the signals that this one passes on from now on."""
        held = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # nohup: outlives its terminal
        here = os.getpid()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # before the fork: the mask holds for this thread alone, and others would take a signal for the end
        before: dict[int, Any] = {s: signal.signal(s, self._pass_on) for s in held}
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        self.pid = os.fork()
        if self.pid == 0:
            for number, handler in before.items():
                signal.signal(number, handler)
            ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
            if os.getppid() != here:
                os._exit(1)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
            code = work()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        return before

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            if self.pid > 0:
                os.kill(self.pid, number)

    def _wait(self, traces: Traces) -> int:
        """Its exit code; below zero: the signal that ended it."""
        while True:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            self.vitals.poll(now)
            for _, why in self.vitals.frozen(now) if self.stacks is None else []:
                self._look_at_frozen(why, traces, now)
            time.sleep(POLL_S)

    def _look_at_frozen(self, why: str, traces: Traces, now: float) -> None:
        """It was silent for too long. It is ended where code of a task holds it up; one that somebody stopped, or that
        is swapped out, may go on later."""
        state = self.vitals.states[self.pid]
        stacks = "" if state_of(self.pid) in STOPPED else read_stacks(self.pid, traces.stacks)
        if not state.doing or not stacks or not blame(Marks.read(traces.marks), frozen=stacks).groups:
            state.heard = now
            return
        self.stacks = stacks
        self.silence = f"{why}; its code stands in {place_in_dump(stacks)}"
        os.kill(self.pid, signal.SIGKILL)

    def _blamed(self, code: int, traces: Traces) -> Blame:
        """Whose code ended it; nobody's where it ended by itself, or by somebody else."""
        marks = Marks.read(traces.marks)
        if self.stacks is not None:
            return blame(marks, frozen=self.stacks)
        if -code in FROM_OUTSIDE and describe_end(code, self.kills_before) != KILLED_FOR_MEMORY:
            return Blame()
        return blame(marks, stacks=read_text(traces.stacks))

    def _ended(self, code: int, found: Blame) -> int:
        """Tell the buffer and the user how it ended, where it could not do so itself. The exit code."""
        if code < 0 or found.groups:
            said = self.silence or describe_end(code, self.kills_before)
            where = f", in {found.place}" if found.place and not self.silence else ""
            self._tell(f"{self.name} {said}{where}", found)
            goes_on = "; the run was told, and goes on: start the same command again to join anew"
            print(f"async-rl: {self.name} {said}{where}{goes_on}", file=sys.stderr)
        return code if code > 0 else 1 if code < 0 or found.groups else LEFT

    def _tell(self, reason: str, found: Blame) -> None:
        gone = msg.Gone(name=self.name, pid=self.pid, reason=reason, groups=found.groups, place=found.place)
        dealer = Dealer(self.target.endpoint, f"{self.identity}{msg.KEEPER}", keys=self.target.keys)
        dealer.send(gone)
        dealer.close(linger_s=SEND_S)
