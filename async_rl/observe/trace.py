"""A run as a Chrome trace, to be opened at ui.perfetto.dev or chrome://tracing.

Trainer, buffer and each generator are one process of the trace. The groups of a generator stand on as many lanes as
overlap, each from its admission to its last token. An arrow leads from a group over its batch to the step that trained
it. The format is the JSON of the Trace Event Format; times are microseconds since the first event shown.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.buffer.store_reader import BatchRow, GroupRow, StoreError, StoreSurvey, Surveyed
from async_rl.errors import UserError
from async_rl.observe import timeline
from async_rl.observe.record import RunRecord, read_run
from async_rl.observe.timeline import Span
from async_rl.run_folder import replace_text

NEWEST_STEPS = 500
"""steps that are drawn unless others are asked for: about 5 MB at 16 groups a step"""
COUNTERS = ("ess/ratio", "lag/mean", "slots/used", "reward/mean")
"""metrics that are drawn as curves"""
LIFE, WORK, LANES = 0, 1, 10
"""thread numbers in a process: when it was alive, what it did, the first lane of its groups"""


@dataclass(slots=True)
class Trace:
    """The events of a trace while it is built."""

    zero: float
    """when the trace begins, seconds since the epoch"""
    events: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    """name of a process -> its number"""
    named: set[tuple[int, int]] = field(default_factory=set)
    """(process, thread) that have their name"""

    def at(self, seconds: float) -> float:
        """A time since the epoch as microseconds of the trace."""
        return round((seconds - self.zero) * 1e6, 1)

    def process(self, name: str) -> int:
        """The number of the process `name`, which is added when it is new."""
        if name not in self.numbers:
            pid = self.numbers[name] = len(self.numbers) + 1
            order = {"trainer": 0, "buffer": 1}.get(name, 2)
            self.events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
            self.events.append(
                {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": order}}
            )
        return self.numbers[name]

    def name_row(self, pid: int, tid: int, name: str) -> None:
        """Name a thread of a process, once."""
        if (pid, tid) not in self.named:
            self.named.add((pid, tid))
            for kind, args in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": tid})):
                self.events.append({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args})

    def span(self, pid: int, tid: int, name: str, start: float, end: float, **args: Any) -> dict[str, Any]:
        """Add a span; `start` and `end` in seconds since the epoch."""
        begin = self.at(start)
        event = {"ph": "X", "name": name, "cat": "run", "pid": pid, "tid": tid, "ts": begin}
        event |= {"dur": round(max(0.0, self.at(end) - begin), 1), "args": args}
        self.events.append(event)
        return event

    def spans_in_turn(self, pid: int, tid: int, spans: Sequence[Span]) -> list[dict[str, Any]]:
        """Add the spans of one row. Clocks of processes differ a little, so what overlaps is cut."""
        drawn, free = [], float("-inf")
        for span in sorted(spans, key=lambda s: s.start):
            start = max(span.start, free)
            if span.end > start:
                drawn.append(
                    self.span(pid, tid, span.doing, start, span.end, **({"what": span.text} if span.text else {}))
                )
                free = span.end
        return drawn

    def flow(self, number: int, stops: Sequence[Mapping[str, Any]]) -> None:
        """Add an arrow over these spans; each must begin no earlier than the one before."""
        for i, stop in enumerate(stops):
            kind = "s" if i == 0 else "f" if i == len(stops) - 1 else "t"
            event = {"ph": kind, "name": "group", "cat": "group", "id": number, "ts": stop["ts"]}
            event |= {"pid": stop["pid"], "tid": stop["tid"]} | ({"bp": "e"} if kind == "f" else {})
            self.events.append(event)


def write_trace(run: Path, out: Path, steps: tuple[int, int] | None = None) -> int:
    """Write the trace of a run and return its number of events.

    `steps`: the first and the last step; None: the newest NEWEST_STEPS. Raises UserError."""
    made = trace(read_run(run), steps)
    try:
        replace_text(out, json.dumps(made, allow_nan=False, separators=(",", ":")))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    return len(made["traceEvents"])


def trace(record: RunRecord, steps: tuple[int, int] | None = None) -> dict[str, Any]:
    """The trace as plain values. Raises UserError when none of the steps was trained."""
    first, last = _steps(record, steps)
    spans = timeline.trainer_spans(record, first, last)
    inside = [row for row in record.rows if first <= row["step"] <= last]
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    groups, episodes, batches = _stored(record, first, last)
    admitted = [g.admitted_at for g in groups]
    made = Trace(zero=min([begin, *admitted]))
    trainer = made.process(timeline.TRAINER)
    made.name_row(trainer, WORK, "steps")
    drawn = made.spans_in_turn(trainer, WORK, spans)
    training = {e["args"]["what"]: e for e in drawn if e["name"] == "training"}
    waiting = _batches(made, batches, training)
    lanes = _groups(made, groups, episodes)
    for group in groups:
        stops = [lanes.get(group.group), waiting.get(group.step), training.get(f"step {group.step}")]
        there = [stop for stop in stops if stop is not None]
        if len(there) > 1 and stops[0] is not None:
            made.flow(group.group, sorted(there, key=lambda stop: float(stop["ts"])))
    for span in timeline.generator_spans(episodes):
        pid = made.process(span.lane)
        made.name_row(pid, WORK, "at work")
        made.span(pid, WORK, span.doing, span.start, span.end, **({"what": span.text} if span.text else {}))
    _lives_and_marks(made, record, made.zero, end)
    for row in inside:
        for key in COUNTERS:
            if isinstance(row.get(key), int | float) and abs(row[key]) < 1e300:
                at = made.at(float(row["time"]))
                made.events.append(
                    {"ph": "C", "name": key, "pid": trainer, "tid": 0, "ts": at, "args": {"value": row[key]}}
                )
    about = {"run": record.name, "steps": f"{first} to {last}", "began": made.zero}
    return {"traceEvents": made.events, "displayTimeUnit": "ms", "otherData": about}


def _steps(record: RunRecord, steps: tuple[int, int] | None) -> tuple[int, int]:
    timed = [int(row["step"]) for row in record.rows if isinstance(row.get("time"), int | float)]
    if not timed:
        raise UserError(f"{record.folder.path}: no step was trained yet, so there is nothing to trace")
    first, last = steps or (max(timed[0], timed[-1] - NEWEST_STEPS + 1), timed[-1])
    if not any(first <= step <= last for step in timed):
        raise UserError(f"--steps {first}:{last} has no trained step; the run has {timed[0]}:{timed[-1]}")
    return first, last


def _stored(record: RunRecord, first: int, last: int) -> tuple[list[GroupRow], list[Surveyed], list[BatchRow]]:
    """The groups of these steps with those that were refused between them, their episodes, and the batches."""
    try:
        with StoreSurvey(record.folder.store) as store:
            low, high = store.group_range(first, last)
            groups = [g for g in store.groups(since=low) if g.group <= high and g.split == "train"]
            episodes = list(store.of_groups(low, high))
            return groups, episodes, [b for b in store.batches() if first <= b.step <= last]
    except (UserError, StoreError):
        return [], [], []  # the trainer's side alone


def _batches(
    made: Trace, batches: Sequence[BatchRow], training: Mapping[str, Mapping[str, Any]]
) -> dict[int | None, Mapping[str, Any]]:
    """Add each batch to the buffer's row, from when it was formed until its step began. Step -> span."""
    pid = made.process("buffer")
    made.name_row(pid, WORK, "batches")
    spans = []
    for batch in batches:
        step = training.get(f"step {batch.step}")
        until = made.zero + step["ts"] / 1e6 if step is not None else batch.formed_at
        spans.append(Span(lane="buffer", doing="batch", start=batch.formed_at, end=until, text=f"step {batch.step}"))
    drawn = made.spans_in_turn(pid, WORK, spans)
    return {int(e["args"]["what"].removeprefix("step ")): e for e in drawn}


def _groups(made: Trace, groups: Sequence[GroupRow], episodes: Sequence[Surveyed]) -> dict[int, Mapping[str, Any]]:
    """Add every group to the first free lane of its generator, and when a generator first held a version.
    Group -> span."""
    finished: dict[int, float] = defaultdict(float)
    for row in episodes:
        finished[row.group] = max(finished[row.group], row.finished_at)
    free: dict[str, list[float]] = defaultdict(list)
    held: dict[str, int] = {}
    found: dict[int, Mapping[str, Any]] = {}
    for group in sorted(groups, key=lambda g: (g.admitted_at, g.group)):
        name = group.generator or timeline.HELD_OUT
        pid, end = made.process(name), finished.get(group.group, 0.0)
        if end <= group.admitted_at:
            continue  # still running, or its episodes are gone
        lanes = free[name]
        lane = next((i for i, until in enumerate(lanes) if until <= group.admitted_at), len(lanes))
        lanes[lane : lane + 1] = [end]
        made.name_row(pid, LANES + lane, f"groups {lane + 1}")
        args: dict[str, Any] = {"problem": group.problem, "version": group.admitted_version, "step": group.step}
        if group.refused_because:
            args["refused"] = group.refused_because
        found[group.group] = made.span(pid, LANES + lane, f"group {group.group}", group.admitted_at, end, **args)
        if group.admitted_version > held.get(name, -1):
            held[name] = group.admitted_version
            made.events.append(_instant(made, pid, WORK, f"holds version {held[name]}", group.admitted_at, {}))
    return found


def _lives_and_marks(made: Trace, record: RunRecord, begin: float, end: float) -> None:
    """Add when each process was alive, and the events."""
    by_lane: dict[str, list[Span]] = defaultdict(list)
    for span in timeline.lives(record):
        if span.end > begin and span.start < end:
            inside = Span(lane=span.lane, doing=span.doing, start=max(begin, span.start), end=min(end, span.end))
            by_lane[span.lane].append(inside)
    for name, spans in by_lane.items():
        pid = made.process(name)
        made.name_row(pid, LIFE, "process")
        made.spans_in_turn(pid, LIFE, spans)
    for mark in timeline.marks(record.events):
        if begin <= mark.at <= end:
            pid = made.process(mark.lane or "launcher")
            made.events.append(_instant(made, pid, LIFE, mark.kind, mark.at, {"what": mark.text[:500]}))


def _instant(made: Trace, pid: int, tid: int, name: str, at: float, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"ph": "i", "s": "p", "name": name, "cat": "run", "pid": pid, "tid": tid, "ts": made.at(at), "args": args}
