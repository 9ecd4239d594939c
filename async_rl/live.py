"""The launcher's view of a running run: it asks the buffer about once a second and writes `live.json`.

Who waits for whom: nobody here. An answer that does not come is itself part of what is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.run_folder import replace_text
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
    path: Path
    steps: int
    """the run's training steps"""
    asked: float = -1e9
    answered: float = -1e9
    detail: Mapping[str, Any] = field(default_factory=dict)
    """of the buffer's last answer"""

    def look(self, now: float, children: Sequence[Mapping[str, object]]) -> None:
        """Take the answer in; ask again, and write what is known, once a second. `children`: one row each."""
        self._listen(now)
        if now - self.asked < (ASK_S if self.answered >= self.asked else PATIENCE_S):
            return
        self.asked = now
        self.dealer.send(msg.Query())
        self.write("running", now, children)

    def gone(self, name: str, pid: int, reason: str) -> None:
        """Tell the buffer that a generator has ended, so that nothing waits for its next life."""
        self.dealer.send(msg.Gone(name=name, pid=pid, reason=reason))

    def write(self, state: str, now: float, children: Sequence[Mapping[str, object]]) -> None:
        """`live.json`, whole or not at all."""
        d = self.detail
        values = {
            "time": time.time(),
            "state": state,
            "steps": self.steps,
            "step": d.get("step", 0),
            "published": d.get("published", 0),
            "slots": {"used": d.get("slots_used", 0), "all": d.get("slots", 0)},
            "processes": _processes(children, d),
            "waits": d.get("waits", []),
            "buffer_answered_s_ago": round(now - self.answered, 3) if self.detail else None,
            "counts": d.get("counts", {}),
        }
        replace_text(self.path, json.dumps(values) + "\n")

    def _listen(self, now: float) -> None:
        while True:
            try:
                message = self.dealer.receive(0.0, "the buffer's state")
            except WireTimeout:
                return
            except WireError:
                continue
            if isinstance(message, msg.Snapshot):
                self.answered, self.detail = now, message.detail


def _processes(children: Sequence[Mapping[str, object]], detail: Mapping[str, Any]) -> list[dict[str, object]]:
    """One row a process: our children, and generators of others that the buffer hears; with what it knows of
    each generator."""
    rows = [{"role": _role(str(row["name"])), **row} for row in children]
    known = {row["name"] for row in rows}
    rows += [dict(row) for row in detail.get("processes", []) if row["name"] not in known]
    generators = {g["name"]: g for g in detail.get("standing", [])}
    return [{**row, **generators.get(row["name"], {})} for row in rows]


def _role(name: str) -> str:
    return name if name in ("buffer", "trainer", "weights") else "generator"
