"""Whether the processes of a run are alive, and how the run stands now.

`Vitals` collects the pulses that the launcher's children write into a pipe; `LiveReport` asks the buffer about once a
second and writes `live.json`.

Who waits for whom: nobody here. An answer that does not come is itself part of the report.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from msgspec import to_builtins

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.events import AlarmRaised, Event, GeneratorQuarantined, RunRolledBack, StallReported
from async_rl.observe.record import active_alarms
from async_rl.process import STACKS_SIGNAL
from async_rl.run_folder import RunFolder, replace_text
from async_rl.stall_timer import StallTimer
from async_rl.trajectory.codec import WireError
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, WireTimeout
from async_rl.wire.heartbeat import STARTING

START_S = 20.0
"""a process that starts may do nothing for so long; a cold disk may hold it up"""
LONGEST_START_S = 600.0
"""and may start for so long. Imports hold Python's lock, so that no pulse comes; on a busy machine they take minutes"""
READ_BYTES = 1 << 16
NEVER = -1.0
QUERY_S = 1.0
"""between two questions to the buffer"""
STACKS_S = 0.5
"""longest wait for a frozen process to write its stacks"""
ANSWER_S = 5.0
"""after which a question that was not answered is asked again"""


@dataclass(slots=True)
class ChildState:
    """What the last pulse of a process said."""

    name: str
    heard: float
    """when the pulse came, or when the process was started; monotonic clock"""
    doing: str = ""
    """empty: no pulse has come yet"""
    since: float = 0.0
    """when it began that"""
    began: float = 0.0
    """when it was started, or its first pulse came"""
    ran_s: float = 0.0
    """processor time that it had got, or waited for, when it was looked at last; seconds"""
    of: int = 0
    """for a rank of the trainer: process number of the child that started it; 0: it is a child itself"""


@dataclass(slots=True)
class Vitals:
    """The pulses of the launcher's children.

    A child writes a line into the pipe about every second, from a thread of its own (wire/heartbeat.py), however busy
    it is. One that has been silent for `wire.frozen_after_s` is frozen: stopped, swapped out, or in code that never
    gives Python's lock back. It is no use waiting for it.
    """

    limit_s: float
    """wire.frozen_after_s"""
    ends: tuple[int, int] = field(init=False)
    """(read, write) of the pipe: the launcher reads, children write"""
    ran_s: Callable[[int], float] = field(default_factory=lambda: processor_s)
    """processor time that a process has got or waited for"""
    states: dict[int, ChildState] = field(default_factory=dict)
    """by process number, so that a generator's new life is not taken for its old one"""
    _polled: float = NEVER
    _partial: bytes = b""
    """a line of which the rest has not come yet"""

    def __post_init__(self) -> None:
        self.ends = os.pipe()
        for end in self.ends:
            os.set_blocking(end, False)  # neither side ever waits for the other

    def add(self, pid: int, name: str, now: float) -> None:
        """A child was started."""
        self.states[pid] = ChildState(name, now, began=now)

    def remove(self, pid: int) -> None:
        """A child has ended, and with it the processes that it started."""
        self.states.pop(pid, None)
        for other in [number for number, state in self.states.items() if state.of == pid]:
            del self.states[other]

    def poll(self, now: float) -> None:
        """Read the pulses that have come. When the launcher itself was stopped meanwhile, nobody's silence counts."""
        while True:
            try:
                new = os.read(self.ends[0], READ_BYTES)
            except BlockingIOError:
                break
            *lines, self._partial = (self._partial + new).split(b"\n")
            for line in lines:
                with suppress(ValueError):  # a line cut by a full pipe
                    self._receive(json.loads(line), now)
        if self._polled != NEVER and self._polled < now - self.limit_s / 2:
            for state in self.states.values():
                state.heard = now
        self._polled = now

    def frozen(self, now: float) -> list[tuple[int, str]]:
        """(process number, why) of those that have been silent for too long."""
        found = []
        for pid, state in self.states.items():
            starts = state.doing in ("", STARTING)
            if starts and now - state.began <= LONGEST_START_S and (ran_s := self.ran_s(pid)) > state.ran_s:
                state.ran_s, state.heard = ran_s, now  # slow, not frozen
            silent = now - state.heard
            if silent > (max(self.limit_s, START_S) if starts else self.limit_s):
                found.append((pid, f"gave no sign of life for {silent:.1f} s {self._describe(state)}"))
        return found

    def rows(self, now: float) -> list[dict[str, object]]:
        """One row a process, for live.json. The ranks of a trainer stand in place of the agent that started them."""
        agents = {state.of for state in self.states.values()}
        return [
            {
                "name": state.name,
                "pid": pid,
                "doing": state.doing or "starting",
                "since_s": round(now - (state.since if state.doing else state.heard), 3),
                "silent_s": round(now - state.heard, 3),
            }
            for pid, state in self.states.items()
            if pid not in agents
        ]

    def close(self) -> None:
        for end in self.ends:
            os.close(end)

    def _receive(self, line: Mapping[str, object], now: float) -> None:
        match line:
            case {"pid": int(pid), "name": str(name), "of": int(of)} if of in self.states and pid not in self.states:
                self.states[pid] = ChildState(name, now, began=now, of=of)  # the first pulse of a rank
        match line:
            case {"pid": int(pid), "doing": str(doing), "since_s": int() | float() as seconds} if pid in self.states:
                state = self.states[pid]
                state.heard, state.doing, state.since = now, doing, now - seconds

    def _describe(self, state: ChildState) -> str:
        limit = f"(wire.frozen_after_s={self.limit_s:g})"
        if state.doing in ("", STARTING):
            return f"{limit} while it starts, and did nothing: it hangs before its first line"
        return (
            f"{limit}: it is frozen (stopped, or held up by code that blocks all of Python); "
            f"last heard: {state.doing}, for {state.heard - state.since:.1f} s"
        )


def processor_s(pid: int) -> float:
    """Seconds that the main thread of a process was computing or waiting for a core; -1 when it is gone."""
    try:
        computed, waited, *_ = Path(f"/proc/{pid}/schedstat").read_text().split()
        return (int(computed) + int(waited)) / 1e9
    except (OSError, ValueError):
        return -1.0


def read_stacks(pid: int, file: Path) -> str:
    """Let a process write the stacks of its threads into `file`, and return them. It does so also while code holds
    Python's lock; empty: it is stopped, or has not come so far."""
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        if caught is None or not int(caught[1], 16) >> (STACKS_SIGNAL - 1) & 1:
            return ""  # the signal would end it
        before = file.stat().st_size
        os.kill(pid, STACKS_SIGNAL)
        deadline, size = time.monotonic() + STACKS_S, before
        while time.monotonic() < deadline:
            time.sleep(STACKS_S / 10)
            grown, size = size, file.stat().st_size
            if size == grown > before:
                break
        with file.open("rb") as written:
            written.seek(before)
            return written.read().decode(errors="replace")
    except OSError:
        return ""


def read_text(file: Path) -> str:
    """What a process left in a file; empty where that cannot be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


@dataclass(slots=True)
class LiveReport:
    """How the run stands, asked from the buffer and written to `live.json`. Times are those of one monotonic clock,
    seconds."""

    dealer: Dealer
    folder: RunFolder
    settings: Settings
    shut: bool = False
    """the buffer was told that the run is over"""
    asked: float = -1e9
    answered: float = -1e9
    waits_since: float | None = None
    """first question that was not answered"""
    stall: StallTimer = field(init=False)
    """when that wait is reported"""
    snapshot: msg.Snapshot | None = None
    """the buffer's last answer"""
    alarms: list[Event] = field(default_factory=list)
    """alarms and rollbacks of the run"""

    def __post_init__(self) -> None:
        self.stall = StallTimer(self.settings.wire.stall_report_s)
        for row in self.folder.read_events():  # of earlier launches
            self.add_event(row.event)

    def add_event(self, event: Event | None) -> None:
        """Take in an event of the run, in their order."""
        if isinstance(event, AlarmRaised | RunRolledBack | GeneratorQuarantined):
            self.alarms.append(event)

    def update(self, now: float, children: Sequence[Mapping[str, object]]) -> None:
        """Take in the buffer's answer; about once a second ask again and write the report. `children`: one row each
        (`Vitals.rows`)."""
        self._receive(now)
        self._report_stall(now, children)
        if now - self.asked < (QUERY_S if self.answered >= self.asked else ANSWER_S):
            return
        self.asked = now
        self.waits_since = now if self.waits_since is None else self.waits_since
        self.dealer.send(msg.Query())
        self.write("running", now, children)

    def report_gone(self, name: str, pid: int, reason: str, *, groups: tuple[int, ...] = (), place: str = "") -> None:
        """Tell the buffer that a generator has ended, so that nothing waits for its next life; and which groups' code
        it ran then, if that may be why."""
        self.dealer.send(msg.Gone(name=name, pid=pid, reason=reason, groups=groups, place=place))

    @property
    def arrived(self) -> int:
        """Trajectories that had arrived at the buffer when it last answered."""
        counts = self.snapshot.counts if self.snapshot is not None else {}
        return counts.get("trajectories_train", 0) + counts.get("trajectories_eval", 0)

    def shut_down(self, reason: str) -> None:
        """Tell the buffer, once, that the run is over."""
        if not self.shut:
            self.shut = True
            self.dealer.send(msg.Shutdown(reason=reason))

    def preempt(self, reason: str) -> None:
        """Have the trainer write a checkpoint and end. May be repeated: a message can get lost."""
        self.dealer.send(msg.Preempt(reason=reason))

    def write(self, state: str, now: float, children: Sequence[Mapping[str, object]]) -> None:
        """Replace `live.json`."""
        found = self.snapshot if self.snapshot is not None else msg.Snapshot()
        values = {
            "time": time.time(),
            "state": state,
            "steps": self.settings.trainer.steps,
            "step": found.step,
            "published": found.published,
            "slots": {"used": found.counters.slots_used, "all": found.counters.slots},
            "processes": _processes(children, found),
            "waits": to_builtins(found.waits),
            "buffer_answered_s_ago": round(now - self.answered, 3) if self.snapshot is not None else None,
            "counts": found.counts,
            "alarms": [asdict(alarm) for alarm in active_alarms(self.alarms)],
        }
        with suppress(OSError, RunFailed):  # a full disk is reported by those who lose something by it
            replace_text(self.folder.live, json.dumps(values) + "\n")

    def _receive(self, now: float) -> None:
        while True:
            try:
                message = self.dealer.receive(0.0, "the buffer's state")
            except WireTimeout:
                return
            except WireError:
                continue
            if isinstance(message, msg.Snapshot):
                self.answered, self.snapshot, self.waits_since = now, message, None

    def _report_stall(self, now: float, children: Sequence[Mapping[str, object]]) -> None:
        """Record that the buffer lives and does not answer, again after twice the time."""
        waited = now - self.waits_since if self.waits_since is not None else 0.0
        if self.stall.due(waited):
            words = [f"{row['doing']} (heard {row['silent_s']} s ago)" for row in children if row["name"] == "buffer"]
            text = f"launcher waits {waited:.0f} s for the buffer's answer; the buffer: {', '.join(words)}"
            self.folder.record(
                StallReported(waits="launcher", what="the buffer's answer", seconds=round(waited, 3), text=text)
            )


def _processes(children: Sequence[Mapping[str, object]], found: msg.Snapshot) -> list[dict[str, object]]:
    """One row a process: our children, then generators of others that the buffer knows; with what the buffer knows of
    each generator."""
    rows = [{"role": _role(str(row["name"])), **row} for row in children]
    known = {row["name"] for row in rows}
    rows += [to_builtins(process) for process in found.processes if process.name not in known]
    generators = {str(state.name): to_builtins(state) for state in found.generators}
    return [{**row, **generators.get(str(row["name"]), {})} for row in rows]


def _role(name: str) -> str:
    if name.startswith("trainer"):
        return "trainer"  # or one of its ranks
    return name if name in ("buffer", "weights") else "generator"
