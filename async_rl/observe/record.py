"""One run as its folder tells it, whether it is finished, still going on or broken off: what every observer reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from async_rl.config import Settings
from async_rl.config.schema import describe, load_yaml
from async_rl.errors import UserError
from async_rl.events import (
    AlarmRaised,
    Event,
    EventRow,
    GeneratorQuarantined,
    MismatchFound,
    ProcessFailed,
    ProcessStarted,
    RunInterrupted,
    RunResumed,
    RunRolledBack,
    read_event_rows,
)
from async_rl.observe.long_files import MOST_BYTES, ReadRows, read_spread
from async_rl.run_folder import RunFolder

State = Literal["finished", "going on", "failed", "stopped", "broken off"]
_ALL = 1 << 62
"""bytes of events: each of them counts"""
TEXTS = ("episodes/failure",)
"""metrics whose values are texts"""
ENDS = (ProcessFailed, RunInterrupted, ProcessStarted, RunResumed)
"""the last of these events tells how a run without a summary and without a launcher ended"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingRow:
    """One setting of the run; mappings are rows of their own, one a leaf."""

    path: str
    value: Any
    meaning: str
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The record of one run at the moment it was read."""

    folder: RunFolder
    rows: tuple[Mapping[str, Any], ...]
    """metric rows, one a step, in the order of the steps; of a long run, evenly spread ones (long_files.py)"""
    events: tuple[EventRow, ...]
    """in the order they were written"""
    summary: Mapping[str, Any] | None
    """None: the run is not finished"""
    settings: Settings | None
    """None: config.yaml is missing or of another version of this program"""
    setting_rows: tuple[SettingRow, ...]
    notes: tuple[str, ...]
    """what could not be read, in words"""
    share: float = 1.0
    """of the metric rows that were read"""
    read_to: int = 0
    """bytes of metrics.jsonl up to the last of them"""

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def steps(self) -> NDArray[np.float64]:  # [rows]
        return np.array([row["step"] for row in self.rows], np.float64)

    def column(self, key: str) -> NDArray[np.float64]:  # [rows]
        """A metric, NaN where a row lacks it."""
        found = [row.get(key) for row in self.rows]
        return np.array([value if type(value) is float else _number(value) for value in found], np.float64)

    def typed_events(self) -> Iterator[Event]:
        """The events that this version of the program knows, in the order they were written."""
        return (row.event for row in self.events if row.event is not None)

    def metric_keys(self) -> list[str]:
        """Every metric that some row has as a number, in the order of first appearance."""
        found: dict[str, None] = {}
        for row in self.rows:
            if not row.keys() <= found.keys():
                found |= dict.fromkeys(row)
        return [key for key in found if key not in ("step", "time", *TEXTS)]

    def state(self) -> tuple[State, str]:
        """How the run stands, and the same in words."""
        last = max((int(row["step"]) + 1 for row in self.rows), default=0)
        wanted = self.settings.trainer.steps if self.settings is not None else None
        done = f"{last:,} of {wanted:,} steps" if wanted is not None else f"{last:,} steps"
        if self.summary is not None:
            return "finished", f"finished: {done}"
        if launcher_lives(self.folder):
            return "going on", f"going on: {done} so far"
        match next((row.event for row in reversed(self.events) if isinstance(row.event, ENDS)), None):
            case ProcessFailed(process=process, message=message):
                return "failed", f"failed after {done}: {process}: {message}"
            case RunInterrupted(signal=signal):
                return "stopped", f"stopped by {signal} after {done}"
            case _:
                return "broken off", f"broke off after {done}: no summary, and no process of it is alive"


def read_run(path: Path) -> RunRecord:
    """Read the run in the folder `path`; lines that cannot be read are left out and noted.

    Raises UserError when `path` is no run folder."""
    folder = RunFolder(path)
    if not folder.metrics.is_file():  # a run that lost its settings is shown all the same
        folder = RunFolder.open(path)
    notes: list[str] = []
    metrics = _read_rows(folder.metrics, notes, MOST_BYTES)
    by_step = {row["step"]: row for row in metrics.rows if isinstance(row.get("step"), int | float)}
    settings, setting_rows = _read_settings(folder, notes)
    return RunRecord(
        folder=folder,
        rows=tuple(by_step[step] for step in sorted(by_step)),
        share=metrics.share,
        read_to=metrics.end,
        events=tuple(read_event_rows(_read_rows(folder.events, notes, _ALL).rows)),
        summary=read_json(folder.summary, notes),
        settings=settings,
        setting_rows=setting_rows,
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """An alarm, a rollback, a quarantine or a mismatch, which every curve is marked with.

    Example: `Incident(step=41, name="alarm ess", text="ess/ratio 0.02 is below 0.05")`.
    """

    step: int
    """the step that raised the alarm, or the first step after a rollback"""
    name: str
    """`alarm ess`, `rollback to 40`"""
    text: str
    """the reason, in words and numbers"""


def incidents(events: Iterable[Event | None]) -> list[Incident]:
    """The alarms, rollbacks, quarantines and mismatches among `events`, in their order."""
    found = []
    for event in events:
        match event:
            case AlarmRaised(step=step, signal=signal, reason=reason):
                found.append(Incident(step=step, name=f"alarm {signal}", text=reason))
            case MismatchFound(step=step, reason=reason, remedy=remedy):
                found.append(Incident(step=step, name="mismatch", text=f"{reason}; {remedy}"))
            case RunRolledBack(version=version, to=to, text=text):
                found.append(Incident(step=version, name=f"rollback to {to}", text=text))
            case GeneratorQuarantined(step=step, name=name, lie=lie, reason=reason):
                text = f"{name} reported {lie} that are not what it did: {reason}"
                found.append(Incident(step=step, name=f"quarantine {name}", text=text))
            case _:
                pass
    return found


def active_alarms(events: Iterable[Event | None]) -> list[Incident]:
    """The alarms that no rollback has settled: all those raised since the run last went back."""
    found: list[Incident] = []
    for incident in incidents(events):
        if incident.name.startswith("rollback"):
            found.clear()
        elif incident.name != "mismatch":  # nothing has collapsed
            found.append(incident)
    return found


def launcher_lives(folder: RunFolder) -> bool:
    """True when the process that holds the run's lock is alive on this machine."""
    try:
        os.kill(int(folder.lock.read_text().strip()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is none. Why it cannot be read is appended to `notes`."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return None
    return found if isinstance(found, dict) else None


def _read_rows(path: Path, notes: list[str], most_bytes: int) -> ReadRows:
    """The whole rows of a JSONL file, evenly spread ones of one that is longer than `most_bytes`; lines that are torn
    or broken are left out. All that is noted."""
    found = read_spread(path, most_bytes)
    if found.share < 1:
        notes.append(
            f"{path.name} is long: of about {len(found.rows) / found.share:,.0f} rows {len(found.rows):,} were read, "
            "evenly spread; what happened between two of them does not show in the curves"
        )
    if found.torn:
        notes.append(f"the last line of {path.name} is not whole; it was left out")
    if found.broken:
        lines = f"{found.broken} line{'s' * (found.broken > 1)}"
        notes.append(f"{lines} of {path.name} cannot be read; left out")
    return found


def _read_settings(folder: RunFolder, notes: list[str]) -> tuple[Settings | None, tuple[SettingRow, ...]]:
    """The settings and their rows; the rows alone when the file is of another version of the program."""
    try:
        settings = folder.settings()
    except UserError as error:
        notes.append(f"config.yaml is not one of this program's version ({error})")
    else:
        rows = [SettingRow(path=i.path, value=i.value, meaning=i.meaning, unit=i.unit) for i in describe(settings)]
        return settings, tuple(flat for row in rows for flat in _leaves(row.path, row.value, row))
    try:
        values = load_yaml(folder.config)
    except UserError:
        return None, ()
    bare = SettingRow(path="", value=None, meaning="", unit="")
    return None, tuple(_leaves("", values, bare))


def _leaves(path: str, value: Any, row: SettingRow) -> Sequence[SettingRow]:
    """A setting as rows, a mapping as one row a leaf."""
    if isinstance(value, Mapping) and value:
        prefix = f"{path}." if path else ""
        return [leaf for name, inner in value.items() for leaf in _leaves(f"{prefix}{name}", inner, row)]
    return [SettingRow(path=path, value=value, meaning=row.meaning, unit=row.unit)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
