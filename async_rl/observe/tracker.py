"""Sends the metrics of a run to TensorBoard and Weights & Biases.

A process of its own reads the files of the run, so the run never waits for it; what goes wrong is reported once, as an
event, and the run goes on. A resumed run continues the same series. TensorBoard can replace what it was sent: steps
that are trained again are sent again. W&B cannot: such steps are not sent twice, they have the same numbers.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from typing import Any, Protocol

from async_rl.events import EvaluationReported, EventRow, TrackerFailed, read_event_rows
from async_rl.observe.record import RunRecord, read_json, read_run
from async_rl.run_folder import RowTail, RunFolder, replace_text
from async_rl.trajectory.parts import PREFIX

EVERY_S = 1.0
STATE = "trackers.json"
"""file in the run folder that says what was delivered"""
HELD_OUT = "reward/eval"


class Writer(Protocol):
    """Writes points to one service."""

    takes_back: bool
    """True when opening it with `first` = a step replaces what was sent for that step and the later ones"""

    def write(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """Write the metrics of one step. `at`: seconds since the epoch."""

    def flush(self) -> None:
        """Make what was written visible."""

    def close(self) -> None:
        """Deliver the rest and end."""


class TensorBoard:
    """Event files in `<run>/tensorboard`: `tensorboard --logdir runs`."""

    takes_back = True

    def __init__(self, folder: Path, *, first: int) -> None:
        """`first`: the first step that will be written; it replaces what earlier files hold from there on."""
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
        """`identity`: id of the W&B run; a run that was begun with it is continued."""
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
        """Does nothing: the package sends by itself."""

    def close(self) -> None:
        self._run.finish()


@dataclass(slots=True)
class Delivered:
    """What one tracker was given, in this launch and the earlier ones."""

    step: int = -1
    """the last step"""
    evaluations: set[int] = field(default_factory=set)
    """numbers of the evaluations"""
    identity: str = ""
    """id of the run in the tracker's own terms"""


@dataclass(slots=True)
class Series:
    """One tracker and what it was given."""

    name: str
    writer: Writer
    delivered: Delivered

    def send_rows(self, rows: Sequence[Mapping[str, Any]], save: Callable[[], None]) -> None:
        """Send the metric rows that were not delivered yet. `save`: writes down what is delivered."""
        new = [row for row in rows if int(row["step"]) > self.delivered.step]
        if new:
            self._send([(int(row["step"]), float(row.get("time", 0.0)), numbers(row)) for row in new], new, (), save)

    def send_evaluations(self, events: Sequence[EventRow], save: Callable[[], None]) -> None:
        """Send the held-out rewards that were not delivered yet."""
        done = [(row.event, row.time) for row in events if isinstance(row.event, EvaluationReported)]
        new = [(event, time) for event, time in done if event.evaluation not in self.delivered.evaluations]
        if new:
            points = [(event.step, time, held_out(event)) for event, time in new if not isnan(event.reward)]
            self._send(points, (), [event.evaluation for event, _ in new], save)

    def _send(
        self,
        points: Sequence[tuple[int, float, Mapping[str, float]]],
        rows: Sequence[Mapping[str, Any]],
        evaluations: Sequence[int],
        save: Callable[[], None],
    ) -> None:
        """Write and note it. For a writer that cannot take back it is noted first, so that after a crash a point is
        missing rather than there twice."""
        if self.writer.takes_back:
            self._write(points)
        self.delivered.step = max([self.delivered.step, *(int(row["step"]) for row in rows)])
        self.delivered.evaluations |= set(evaluations)
        save()
        if not self.writer.takes_back:
            self._write(points)

    def _write(self, points: Sequence[tuple[int, float, Mapping[str, float]]]) -> None:
        for step, at, values in points:
            self.writer.write(step, at, values)
        self.writer.flush()


@dataclass(slots=True)
class Tracker:
    """Follows the files of a run and sends what is new to all its trackers."""

    folder: RunFolder
    series: list[Series]
    metrics: RowTail = field(init=False)
    events: RowTail = field(init=False)

    def __post_init__(self) -> None:
        self.metrics, self.events = RowTail(self.folder.metrics), RowTail(self.folder.events)

    def follow(self, over: Callable[[float], bool]) -> None:
        """Send what comes until the run has ended. `over(seconds)` waits up to `seconds` and says whether it has."""
        while True:
            ended = over(EVERY_S)
            rows = self.metrics.new()
            told = read_event_rows(self.events.new())
            rows = [row for row in rows if "step" in row]
            for one in list(self.series):
                self._guarded(one, lambda s: s.send_rows(rows, self.save))  # noqa: B023
                self._guarded(one, lambda s: s.send_evaluations(told, self.save))  # noqa: B023
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
        """Write down what is delivered, for the next launch."""
        before = read_json(self.folder.path / STATE, []) or {}
        now = {
            one.name: {**asdict(one.delivered), "evaluations": sorted(one.delivered.evaluations)} for one in self.series
        }
        replace_text(self.folder.path / STATE, json.dumps({**before, **now}) + "\n")


def open_tracker(folder: RunFolder, names: Sequence[str], version: int) -> Tracker:
    """A tracker with every writer that can be opened; for the others an event says why not.

    `version`: the version that this launch begins with."""
    tracker = Tracker(folder, [])
    record = read_run(folder.path)
    told = [row.event for row in record.events if isinstance(row.event, EvaluationReported)]
    for name in names:
        delivered = _delivered(folder, name)
        try:
            if name == "tensorboard":
                first = min(version, delivered.step + 1)
                delivered.step = first - 1
                # evaluations after that step are taken back with it
                delivered.evaluations &= {e.evaluation for e in told if e.step < first}
                writer: Writer = TensorBoard(folder.path, first=first)
            else:
                delivered.identity = delivered.identity or uuid.uuid4().hex[:12]
                writer = WeightsAndBiases(record, identity=delivered.identity)
        except Exception as error:  # as in Tracker
            report_failure(folder, name, error)
            continue
        tracker.series.append(Series(name, writer, delivered))
    tracker.save()
    return tracker


def report_failure(folder: RunFolder, name: str, error: Exception) -> None:
    """Record that the tracker `name` failed."""
    reason = f"{type(error).__name__}: {error}"
    folder.record(TrackerFailed(name=name, reason=reason))


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row, without step and time."""
    return {k: float(v) for k, v in row.items() if k not in ("step", "time") and isinstance(v, int | float)}


def held_out(event: EvaluationReported) -> dict[str, float]:
    """The held-out reward and its parts."""
    return {HELD_OUT: event.reward, **{f"{PREFIX}{name}/eval": value for name, value in event.parts.items()}}


def _delivered(folder: RunFolder, name: str) -> Delivered:
    known = (read_json(folder.path / STATE, []) or {}).get(name)
    if not isinstance(known, dict):
        return Delivered()
    return Delivered(
        step=int(known.get("step", -1)),
        evaluations=set(known.get("evaluations", ())),
        identity=str(known.get("identity", "")),
    )
