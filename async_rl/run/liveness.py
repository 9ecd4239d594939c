"""The launcher's view of a running run: it asks the buffer about once a second and writes `live.json`.

Who waits for whom: nobody here. An answer that does not come is itself part of what is written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from msgspec import to_builtins

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.events import AlarmRaised, Event, RunRolledBack, StallReported
from async_rl.observe.record import standing
from async_rl.run_folder import RunFolder, replace_text
from async_rl.trajectory.codec import WireError
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, WireTimeout

# -------------------- vitals
# What the launcher knows of its children: their signs of life, through a pipe that each of them writes to.
#
# A child that lives says so about every second, from a thread of its own (wire/heartbeat.py), however busy it
# is. One that has said nothing for `wire.frozen_after_s` is frozen: stopped, swapped out, or in code that never
# gives Python's lock back. It is no use waiting for it.

START_S = 20.0
"""time a process gets until its first sign, before it imports torch; a cold disk may hold that up"""
_READ_BYTES = 1 << 16


@dataclass(slots=True)
class Sign:
    """The last sign of life of one process."""

    name: str
    heard: float
    """when it came, or when the process was started; monotonic clock"""
    doing: str = ""
    """empty: nothing came yet"""
    since: float = 0.0
    """when it began that"""
    of: int = 0
    """of a rank of the trainer: process number of the child that started it; 0: it is a child itself"""


@dataclass(slots=True)
class Vitals:
    """By process number, so that a generator's new life is not taken for its old one."""

    limit_s: float
    ends: tuple[int, int] = field(init=False)
    """of the pipe: where the launcher reads, where children write"""
    signs: dict[int, Sign] = field(default_factory=dict)
    _looked: float = -1.0
    """when; before the first time -1"""
    _partial: bytes = b""

    def __post_init__(self) -> None:
        self.ends = os.pipe()
        for end in self.ends:
            os.set_blocking(end, False)  # neither side ever waits for the other

    def began(self, pid: int, name: str, now: float) -> None:
        """A child was started."""
        self.signs[pid] = Sign(name, now)

    def ended(self, pid: int) -> None:
        """With it those that it started."""
        self.signs.pop(pid, None)
        for other in [number for number, sign in self.signs.items() if sign.of == pid]:
            del self.signs[other]

    def look(self, now: float) -> None:
        """Take in what has come. When the launcher itself was away, everybody gets their time anew."""
        while True:
            try:
                new = os.read(self.ends[0], _READ_BYTES)
            except BlockingIOError:
                break
            *lines, self._partial = (self._partial + new).split(b"\n")
            for line in lines:
                with suppress(ValueError):  # a line cut by a full pipe
                    self._hear(json.loads(line), now)
        if 0 <= self._looked < now - self.limit_s / 2:
            for sign in self.signs.values():
                sign.heard = now
        self._looked = now

    def frozen(self, now: float) -> list[tuple[int, str]]:
        """(pid, why) of those that have been silent for too long."""
        found = []
        for pid, sign in self.signs.items():
            silent = now - sign.heard
            if silent > (self.limit_s if sign.doing else max(self.limit_s, START_S)):
                found.append((pid, f"gave no sign of life for {silent:.1f} s {self._last(sign, now)}"))
        return found

    def rows(self, now: float) -> list[dict[str, object]]:
        """One a process, in plain values. What started the trainer's ranks stands behind them."""
        heard = {sign.of for sign in self.signs.values()}
        return [
            {
                "name": sign.name,
                "pid": pid,
                "doing": sign.doing or "starting",
                "since_s": round(now - (sign.since if sign.doing else sign.heard), 3),
                "silent_s": round(now - sign.heard, 3),
            }
            for pid, sign in self.signs.items()
            if pid not in heard
        ]

    def close(self) -> None:
        for end in self.ends:
            os.close(end)

    def _hear(self, line: Mapping[str, object], now: float) -> None:
        match line:
            case {"pid": int(pid), "name": str(name), "of": int(of)} if of in self.signs and pid not in self.signs:
                self.signs[pid] = Sign(name, now, of=of)  # a rank, heard of for the first time
        match line:
            case {"pid": int(pid), "doing": str(doing), "since_s": int() | float() as seconds} if pid in self.signs:
                sign = self.signs[pid]
                sign.heard, sign.doing, sign.since = now, doing, now - seconds

    def _last(self, sign: Sign, now: float) -> str:
        limit = f"(wire.frozen_after_s={self.limit_s:g})"
        if not sign.doing:
            return f"{limit} since it was started: it hangs before its first line"
        for_s = sign.heard - sign.since
        return (
            f"{limit}: it is frozen (stopped, or held up by code that blocks all of Python); "
            f"last heard: {sign.doing}, for {for_s:.1f} s"
        )


ASK_S = 1.0
"""between two questions"""
PATIENCE_S = 5.0
"""after which a question that was not answered is asked again"""


@dataclass(slots=True)
class Live:
    """Times are those of one monotonic clock, seconds."""

    dealer: Dealer
    folder: RunFolder
    settings: Settings
    shut: bool = False
    """the buffer was told that the run is over"""
    asked: float = -1e9
    answered: float = -1e9
    waits_since: float | None = None
    """first question that was not answered"""
    told_at: float = 0.0
    """length of that wait when it was reported last"""
    snapshot: msg.Snapshot | None = None
    """the buffer's last answer"""
    alarms: list[Event] = field(default_factory=list)
    """events of alarms and rollbacks"""

    def __post_init__(self) -> None:
        for row in self.folder.read_events():  # of earlier launches
            self.hear(row.event)

    def hear(self, event: Event | None) -> None:
        """One of events.jsonl, in order."""
        if isinstance(event, AlarmRaised | RunRolledBack):
            self.alarms.append(event)

    def look(self, now: float, children: Sequence[Mapping[str, object]]) -> None:
        """Take the answer in; ask again, and write what is known, once a second. `children`: one row each."""
        self._listen(now)
        self._report(now, children)
        if now - self.asked < (ASK_S if self.answered >= self.asked else PATIENCE_S):
            return
        self.asked = now
        self.waits_since = now if self.waits_since is None else self.waits_since
        self.dealer.send(msg.Query())
        self.write("running", now, children)

    def gone(self, name: str, pid: int, reason: str) -> None:
        """Tell the buffer that a generator has ended, so that nothing waits for its next life."""
        self.dealer.send(msg.Gone(name=name, pid=pid, reason=reason))

    def shut_down(self, reason: str) -> None:
        """The run is over; said once."""
        if not self.shut:
            self.shut = True
            self.dealer.send(msg.Shutdown(reason=reason))

    def write(self, state: str, now: float, children: Sequence[Mapping[str, object]]) -> None:
        """`live.json`, whole or not at all."""
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
            "alarms": [asdict(alarm) for alarm in standing(self.alarms)],
        }
        with suppress(OSError, RunFailed):  # a full disk is for those to tell who lose something by it
            replace_text(self.folder.live, json.dumps(values) + "\n")

    def _listen(self, now: float) -> None:
        while True:
            try:
                message = self.dealer.receive(0.0, "the buffer's state")
            except WireTimeout:
                return
            except WireError:
                continue
            if isinstance(message, msg.Snapshot):
                self.answered, self.snapshot, self.waits_since = now, message, None

    def _report(self, now: float, children: Sequence[Mapping[str, object]]) -> None:
        """A buffer that lives and does not answer."""
        waited = now - self.waits_since if self.waits_since is not None else 0.0
        if waited < self.settings.wire.stall_report_s:
            self.told_at = 0.0
        elif waited >= 2 * self.told_at:
            self.told_at = waited
            words = [f"{row['doing']} (heard {row['silent_s']} s ago)" for row in children if row["name"] == "buffer"]
            text = f"launcher waits {waited:.0f} s for the buffer's answer; the buffer: {', '.join(words)}"
            self.folder.record(
                StallReported(waits="launcher", what="the buffer's answer", seconds=round(waited, 3), text=text)
            )


def _processes(children: Sequence[Mapping[str, object]], found: msg.Snapshot) -> list[dict[str, object]]:
    """One row a process: our children, and generators of others that the buffer hears; with what it knows of
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
