"""The launcher's view of a running run: it asks the buffer about once a second and writes `live.json`.

Who waits for whom: nobody here. An answer that does not come is itself part of what is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from async_rl.errors import RunFailed
from async_rl.observe.alarms import standing
from async_rl.run_folder import RunFolder, read_rows, replace_text
from async_rl.settings import Settings
from async_rl.trajectory.codec import WireError
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, WireTimeout

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
    detail: Mapping[str, Any] = field(default_factory=dict)
    """of the buffer's last answer"""
    alarms: list[Mapping[str, Any]] = field(default_factory=list)
    """events of alarms and rollbacks"""

    def __post_init__(self) -> None:
        for event in read_rows(self.folder.events):  # of earlier launches
            self.hear(event)

    def hear(self, event: Mapping[str, Any]) -> None:
        """One of events.jsonl, in order."""
        if event.get("event") in ("alarm", "rollback"):
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
        d = self.detail
        values = {
            "time": time.time(),
            "state": state,
            "steps": self.settings.trainer.steps,
            "step": d.get("step", 0),
            "published": d.get("published", 0),
            "slots": {"used": d.get("slots_used", 0), "all": d.get("slots", 0)},
            "processes": _processes(children, d),
            "waits": d.get("waits", []),
            "buffer_answered_s_ago": round(now - self.answered, 3) if self.detail else None,
            "counts": d.get("counts", {}),
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
                self.answered, self.detail, self.waits_since = now, message.detail, None

    def _report(self, now: float, children: Sequence[Mapping[str, object]]) -> None:
        """A buffer that lives and does not answer."""
        waited = now - self.waits_since if self.waits_since is not None else 0.0
        if waited < self.settings.wire.stall_report_s:
            self.told_at = 0.0
        elif waited >= 2 * self.told_at:
            self.told_at = waited
            words = [f"{row['doing']} (heard {row['silent_s']} s ago)" for row in children if row["name"] == "buffer"]
            text = f"launcher waits {waited:.0f} s for the buffer's answer; the buffer: {', '.join(words)}"
            detail = {"waits": "launcher", "for": "the buffer's answer", "seconds": round(waited, 3), "text": text}
            self.folder.event("stall", **detail, time=time.time())


def _processes(children: Sequence[Mapping[str, object]], detail: Mapping[str, Any]) -> list[dict[str, object]]:
    """One row a process: our children, and generators of others that the buffer hears; with what it knows of
    each generator."""
    rows = [{"role": _role(str(row["name"])), **row} for row in children]
    known = {row["name"] for row in rows}
    rows += [dict(row) for row in detail.get("processes", []) if row["name"] not in known]
    generators = {g["name"]: g for g in detail.get("standing", [])}
    return [{**row, **generators.get(row["name"], {})} for row in rows]


def _role(name: str) -> str:
    if name.startswith("trainer"):
        return "trainer"  # or one of its ranks
    return name if name in ("buffer", "weights") else "generator"
