"""A run watched from outside through its files: how far it is, who was started, when it last moved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.buffer.store_reader import GroupRow, StoreReader
from async_rl.observe.audit import Audit, Violation, audit_rows, describe_violations
from async_rl.run_folder import RunFolder

STARTS = ("started", "buffer_ready", "trainer_ready", "generator_ready", "resumed")
MOVES = (*STARTS, "evaluation", "checkpoint")
"""events that are progress"""


@dataclass(slots=True)
class Lines:
    """The whole lines of a file that grows, and is now and then replaced by a shorter one."""

    path: Path
    _inode: int = -1
    _offset: int = 0

    def new(self) -> tuple[bool, list[Mapping[str, Any]]]:
        """(whether it was replaced, rows that were not there before, or all of a replaced file)"""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                replaced = self._inode >= 0 and (status.st_ino != self._inode or status.st_size < self._offset)
                if replaced or self._inode < 0:
                    self._offset = 0
                self._inode = status.st_ino
                if status.st_size == self._offset:
                    return replaced, []
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return False, []
        self._offset += len(whole) + len(newline)
        return replaced, [json.loads(line) for line in whole.splitlines()] if newline else []


@dataclass(slots=True)
class Watch:
    """What `look` found out so far. Times are of the clock that is passed in, seconds."""

    folder: RunFolder
    moved_at: float
    """last progress"""
    steps_done: int = 0
    """in the present life"""
    furthest: int = 0
    """in any life"""
    stepped_at: float = -1.0
    """last new metric row"""
    longest_stall_s: float = 0.0
    stalled_where: str = ""
    last: str = "the start"
    """the progress before the present wait"""
    _metrics: Lines = field(init=False)
    _events: Lines = field(init=False)
    _known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._metrics, self._events = Lines(self.folder.metrics), Lines(self.folder.events)

    def look(self, now: float) -> list[Mapping[str, Any]]:
        """New events, in order."""
        replaced, rows = self._metrics.new()
        if rows:
            self.steps_done = int(rows[-1]["step"]) + 1
        elif replaced:
            self.steps_done = 0
        if rows and not replaced:  # what a resumed run keeps is no progress
            self.furthest = max(self.furthest, self.steps_done)
            self.stepped_at = now
            self._moved(now, f"step {self.steps_done - 1}")
        fresh = []
        for event in self._events.new()[1]:  # after a replacement all of them come again
            key = json.dumps(event, sort_keys=True)
            if key not in self._known:
                self._known.add(key)
                fresh.append(event)
        for event in fresh:
            if event["event"] in MOVES:
                what = event.get("process") or event.get("name") or event.get("version") or event.get("step")
                self._moved(now, event["event"] + (f" ({what})" if what is not None else ""))
        self._stall(now, "")
        return fresh

    def stalled_s(self, now: float) -> float:
        """Since the last progress."""
        return now - self.moved_at

    def _moved(self, now: float, what: str) -> None:
        self._stall(now, what)
        self.moved_at, self.last = now, what

    def _stall(self, now: float, until: str) -> None:
        if self.stalled_s(now) >= self.longest_stall_s:
            self.longest_stall_s = self.stalled_s(now)
            self.stalled_where = f"after {self.last}" + (f", before {until}" if until else "")


# -------------------- memory
# What a store said before a death must still be true after it: the audit's witness.
#
# An audit of the end alone cannot see a group that was stored, forgotten, and admitted anew under its number.


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What was committed at one moment."""

    groups: Mapping[int, GroupRow]
    batches: Mapping[int, tuple[int, ...]]
    """step -> groups"""
    samples: frozenset[tuple[int, int]]
    """(group, sample) that waited for a batch"""


def remember(store: StoreReader) -> Memory:
    """Reads rows only."""
    waiting = [row.group for row in store.groups(unfinished=True) if row.split == "train"]
    return Memory(
        groups={row.group: row for row in store.groups()},
        batches={batch.step: batch.groups for batch in store.batches()},
        samples=frozenset((t.group, t.sample) for group in waiting for t in store.trajectories_of(group)),
    )


def forgotten(memory: Memory, store: StoreReader) -> Iterator[Violation]:
    """What has been taken back since. A group may only go on: into a batch, or to a refusal."""
    groups = {row.group: row for row in store.groups()}
    batches = {batch.step: batch.groups for batch in store.batches()}
    for number, before in memory.groups.items():
        now = groups.get(number)
        if now is None:
            yield Violation(kind="lost", what=f"group {number} was in the store when a process died, and is not any more")
            continue
        if (now.problem, now.position, now.attempt) != (before.problem, before.position, before.attempt):
            yield Violation(
                kind="duplicated",
                what=f"group {number} was problem {before.problem} at position {before.position} when a process died; "
                f"now it is problem {now.problem} at position {now.position}",
            )
        for what, earlier, later in (
            ("in the batch of step", before.step, now.step),
            ("refused:", before.refused_because, now.refused_because),
        ):
            if earlier is not None and earlier != later:
                yield Violation(
                    kind="lost", what=f"group {number} was {what} {earlier} when a process died, then {what} {later}"
                )
    for step, members in memory.batches.items():
        if batches.get(step) != members:
            yield Violation(
                kind="batch",
                what=f"the batch of step {step} was {members} when a process died, then {batches.get(step)}",
            )
    kept = {(t.group, t.sample) for group in {g for g, _ in memory.samples} for t in store.trajectories_of(group)}
    for group, sample in sorted(memory.samples - kept):
        yield Violation(
            kind="lost", what=f"sample {sample} of group {group} was stored when a process died, and is not any more"
        )


# -------------------- report
# What came of a run under chaos: `chaos.json`, a table, and what went wrong with the evidence.


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Counted while the run goes on; `audit` and `replay_identical` come at its end."""

    seed: int
    planned: int
    """faults"""
    kills: int = 0
    freezes: int = 0
    slows: int = 0
    disconnects: int = 0
    resumes: int = 0
    hangs: int = 0
    seconds: float = 0.0
    max_stall_seconds: float = 0.0
    stalled_where: str = ""
    problems: list[str] = field(default_factory=list)
    """what must not be, beside the audit's findings"""
    audit: Audit | None = None
    replay_identical: bool | None = None
    """None: not tried, the run did not come to its end"""
    replayed_from: int = 0
    """version; above 0 where the batches before are deleted (buffer.keep_steps)"""
    replay: str = ""
    """in words"""

    @property
    def done(self) -> int:
        return self.kills + self.freezes + self.slows + self.disconnects

    @property
    def clean(self) -> bool:
        return not self.problems and self.audit is not None and not self.audit.violations and bool(self.replay_identical)

    def to_dict(self) -> Mapping[str, Any]:
        """For chaos.json."""
        a = self.audit
        return {
            "seed": self.seed,
            "faults_planned": self.planned,
            "kills": self.kills,
            "freezes": self.freezes,
            "slows": self.slows,
            "disconnects": self.disconnects,
            "resumes": self.resumes,
            "groups_admitted": a.groups_admitted if a else None,
            "groups_trained": a.groups_trained if a else None,
            "groups_refused": a.groups_refused if a else None,
            "lost": a.count("lost") if a else None,
            "duplicated": a.count("duplicated") if a else None,
            "hangs": self.hangs,
            "max_stall_seconds": round(self.max_stall_seconds, 2),
            "max_stall_where": self.stalled_where,
            "lag_max": a.lag_max if a else None,
            "replay_identical": self.replay_identical,
            "replayed_from_version": self.replayed_from,
            "seconds": round(self.seconds, 1),
            "clean": self.clean,
            "problems": [*self.problems, *(describe_violations(a.violations) if a else [])],
        }


def table(outcome: Outcome) -> list[str]:
    """Lines for the terminal."""
    rows = [
        ("faults", f"{outcome.kills} kills, {outcome.freezes} freezes, {outcome.slows} slowed, "
                   f"{outcome.disconnects} disconnected; {outcome.done} of {outcome.planned} planned"),
        ("resumed", f"{outcome.resumes} times, {outcome.seconds:.0f} s in all"),
        ("hangs", str(outcome.hangs)),
        ("longest stall", f"{outcome.max_stall_seconds:.1f} s, {outcome.stalled_where}"),
    ]  # fmt: skip
    if outcome.audit is not None:
        rows += audit_rows(outcome.audit)
    identical = {True: "identical weights", False: "NOT identical", None: "not tried"}
    begun = f", from version {outcome.replayed_from} on" if outcome.replayed_from else ""
    rows.append(("replay", identical[outcome.replay_identical] + begun))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def verdict(outcome: Outcome) -> list[str]:
    """What is wrong, with the evidence; or that nothing is."""
    if outcome.clean:
        return ["Nothing was lost, nothing was trained twice, nothing hung."]
    lines = [*outcome.problems, *(describe_violations(outcome.audit.violations) if outcome.audit is not None else [])]
    if outcome.replay_identical is False:
        lines.append(f"replay: {outcome.replay}")
    return [f"WRONG: {line}" for line in lines]
