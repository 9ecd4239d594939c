"""Metrics of a run to TensorBoard and Weights & Biases, by a process of its own that reads the run's files: the
run never waits for it, and what goes wrong with it is told once as an event.

A resumed run goes on in the same series. Where the past of a series can be taken back (TensorBoard), steps that
are trained again are sent again in place of the old ones; else (W&B) they are not sent twice: they were
trained on the same numbers.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from async_rl.events import EvaluationReported, EventRow, TrackerFailed, read_event_rows
from async_rl.observe.record import RunRecord, read_json, read_run
from async_rl.run_folder import Follower, RunFolder, replace_text

EVERY_S = 1.0
STATE = "trackers.json"
"""what has been sent, in the run folder"""
HELD_OUT = "reward/eval"


class Writer(Protocol):
    """Where numbers go."""

    takes_back: bool
    """what was sent for a step and the later ones can be replaced, by opening with `first` = that step"""

    def write(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """`at`: seconds since the epoch."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`: `tensorboard --logdir runs`."""

    takes_back = True

    def __init__(self, folder: Path, *, first: int) -> None:
        """`first`: the first step that will be written; what earlier files have from there on no longer holds."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._out = EventFileWriter(str(folder / "tensorboard"))
        if first > 0:
            start = SessionLog(status=SessionLog.SessionStatus.START)
            self._out.add_event(Event(wall_time=time.time(), step=first, session_log=start))

    def write(self, step: int, at: float, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._out.add_event(Event(wall_time=at, step=step, summary=summary))

    def flush(self) -> None:
        self._out.flush()

    def close(self) -> None:
        self._out.close()


class WeightsAndBiases:
    """A W&B run of the folder's name; its files are in `<run>/wandb`. WANDB_MODE, WANDB_PROJECT and the other
    variables of W&B hold; WANDB_MODE=offline needs no account."""

    takes_back = False

    def __init__(self, record: RunRecord, *, identity: str) -> None:
        """`identity`: of the W&B run; the same one goes on with it."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "async_rl"),
            name=record.name,
            id=identity,
            resume="allow",
            dir=str(record.folder.path),
            config={row.path: row.value for row in record.setting_rows},
            settings=wandb.Settings(console="off", silent=True),
        )
        # W&B's own step only ever rises; ours is a column, so that an evaluation may come behind later steps
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, at: float, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """It sends what it has by itself."""

    def close(self) -> None:
        self._run.finish()


@dataclass(slots=True)
class Sent:
    """What one tracker has been given, kept over launches."""

    step: int = -1
    """last step"""
    evaluations: set[int] = field(default_factory=set)
    identity: str = ""
    """of the tracker's own run"""


@dataclass(slots=True)
class Series:
    """One tracker and what it was sent."""

    name: str
    writer: Writer
    sent: Sent

    def rows(self, rows: Sequence[Mapping[str, Any]], save: Callable[[], None]) -> None:
        new = [row for row in rows if int(row["step"]) > self.sent.step]
        if new:
            self._send([(int(row["step"]), float(row.get("time", 0.0)), numbers(row)) for row in new], new, (), save)

    def evaluations(self, events: Sequence[EventRow], save: Callable[[], None]) -> None:
        done = [(row.event, row.time) for row in events if isinstance(row.event, EvaluationReported)]
        new = [(event, time) for event, time in done if event.evaluation not in self.sent.evaluations]
        if new:
            points = [(event.step, time, {HELD_OUT: event.reward}) for event, time in new]
            self._send(points, (), [event.evaluation for event, _ in new], save)

    def _send(
        self,
        points: Sequence[tuple[int, float, Mapping[str, float]]],
        rows: Sequence[Mapping[str, Any]],
        evaluations: Sequence[int],
        save: Callable[[], None],
    ) -> None:
        """Of a writer that cannot take back it is noted before: after a crash a point is missing, not doubled."""
        if self.writer.takes_back:
            self._write(points)
        self.sent.step = max([self.sent.step, *(int(row["step"]) for row in rows)])
        self.sent.evaluations |= set(evaluations)
        save()
        if not self.writer.takes_back:
            self._write(points)

    def _write(self, points: Sequence[tuple[int, float, Mapping[str, float]]]) -> None:
        for step, at, values in points:
            self.writer.write(step, at, values)
        self.writer.flush()


@dataclass(slots=True)
class Tracker:
    """All trackers of a run."""

    folder: RunFolder
    series: list[Series]
    metrics: Follower = field(init=False)
    events: Follower = field(init=False)

    def __post_init__(self) -> None:
        self.metrics, self.events = Follower(self.folder.metrics), Follower(self.folder.events)

    def follow(self, over: Callable[[float], bool]) -> None:
        """Send what comes until `over(seconds)`, which waits so long, says that the run has ended."""
        while True:
            ended = over(EVERY_S)
            rows, _ = self.metrics.new()
            events, _ = self.events.new()
            told = read_event_rows(events)
            rows = [row for row in rows if "step" in row]
            for one in list(self.series):
                self._guarded(one, lambda s: s.rows(rows, self.save))  # noqa: B023
                self._guarded(one, lambda s: s.evaluations(told, self.save))  # noqa: B023
            if ended or not self.series:
                break
        for one in list(self.series):
            self._guarded(one, lambda s: s.writer.close())

    def _guarded(self, one: Series, work: Callable[[Series], None]) -> None:
        if one not in self.series:
            return
        try:
            work(one)
        except Exception as error:  # the boundary to a package that is not ours: reported, and it ends the tracker
            self.series.remove(one)
            report_failure(self.folder, one.name, error)

    def save(self) -> None:
        before = read_json(self.folder.path / STATE, []) or {}
        now = {one.name: {**asdict(one.sent), "evaluations": sorted(one.sent.evaluations)} for one in self.series}
        replace_text(self.folder.path / STATE, json.dumps({**before, **now}) + "\n")


def open_tracker(folder: RunFolder, names: Sequence[str], version: int) -> Tracker:
    """The trackers that can be opened; of the others it is told why not. `version`: where this launch begins."""
    tracker = Tracker(folder, [])
    record = read_run(folder.path)
    told = [row.event for row in record.events if isinstance(row.event, EvaluationReported)]
    for name in names:
        sent = _sent(folder, name)
        try:
            if name == "tensorboard":
                first = min(version, sent.step + 1)
                sent.step = first - 1
                # evaluations after that step are taken back with it
                sent.evaluations &= {e.evaluation for e in told if e.step < first}
                writer: Writer = TensorBoard(folder.path, first=first)
            else:
                sent.identity = sent.identity or uuid.uuid4().hex[:12]
                writer = WeightsAndBiases(record, identity=sent.identity)
        except Exception as error:  # as in Tracker
            report_failure(folder, name, error)
            continue
        tracker.series.append(Series(name, writer, sent))
    tracker.save()
    return tracker


def report_failure(folder: RunFolder, name: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    folder.record(TrackerFailed(name=name, reason=reason))


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row."""
    return {k: float(v) for k, v in row.items() if k not in ("step", "time") and isinstance(v, int | float)}


def _sent(folder: RunFolder, name: str) -> Sent:
    known = (read_json(folder.path / STATE, []) or {}).get(name)
    if not isinstance(known, dict):
        return Sent()
    return Sent(
        step=int(known.get("step", -1)),
        evaluations=set(known.get("evaluations", ())),
        identity=str(known.get("identity", "")),
    )
