"""What a run folder holds, read from outside: of a run that goes on, is done, or broke off half-way."""

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
    ProcessFailed,
    ProcessStarted,
    RunInterrupted,
    RunResumed,
    RunRolledBack,
    read_event_rows,
)
from async_rl.run_folder import RunFolder

# -------------------- alarms
# Alarms and rollbacks of a run, out of its events.


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Worth a line on every curve."""

    step: int
    """that raised the alarm; the first one after a rollback"""
    name: str
    """`alarm ess`, `rollback to 40`"""
    text: str
    """why, in words and numbers"""


def incidents(events: Iterable[Event | None]) -> list[Incident]:
    """In the order of the events."""
    found = []
    for event in events:
        match event:
            case AlarmRaised(step=step, signal=signal, reason=reason):
                found.append(Incident(step=step, name=f"alarm {signal}", text=reason))
            case RunRolledBack(version=version, to=to, text=text):
                found.append(Incident(step=version, name=f"rollback to {to}", text=text))
            case _:
                pass
    return found


def standing(events: Iterable[Event | None]) -> list[Incident]:
    """The alarms that were raised since the run went back, if it did."""
    found: list[Incident] = []
    for incident in incidents(events):
        if incident.name.startswith("rollback"):
            found.clear()
        else:
            found.append(incident)
    return found


State = Literal["finished", "going on", "failed", "stopped", "broken off"]
ENDS = (ProcessFailed, RunInterrupted, ProcessStarted, RunResumed)
"""events that tell how the last launch stands"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingRow:
    path: str
    value: Any
    meaning: str
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run as its folder tells it."""

    folder: RunFolder
    rows: tuple[Mapping[str, Any], ...]
    """metric rows, one a step, in order"""
    events: tuple[EventRow, ...]
    """in the order they were written"""
    summary: Mapping[str, Any] | None
    """None: not finished"""
    settings: Settings | None
    """None: config.yaml is missing or of another version of this program"""
    setting_rows: tuple[SettingRow, ...]
    notes: tuple[str, ...]
    """what could not be read, in words"""

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def steps(self) -> NDArray[np.float64]:  # [rows]
        return np.array([row["step"] for row in self.rows], np.float64)

    def column(self, key: str) -> NDArray[np.float64]:  # [rows]
        """A metric, NaN where a row lacks it."""
        return np.array([_number(row.get(key)) for row in self.rows], np.float64)

    def typed_events(self) -> Iterator[Event]:
        """Those of this version, in the order they were written."""
        return (row.event for row in self.events if row.event is not None)

    def metric_keys(self) -> list[str]:
        """Every metric that some row has, in the order of first appearance."""
        found: dict[str, None] = {}
        for row in self.rows:
            if not row.keys() <= found.keys():
                found |= dict.fromkeys(row)
        return [key for key in found if key not in ("step", "time")]

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
    """Raises UserError when `path` is no run folder."""
    folder = RunFolder(path)
    if not folder.config.is_file() and not folder.metrics.is_file():
        raise UserError(f"{path} is not a run folder: there is no {folder.config.name} in it")
    notes: list[str] = []
    by_step = {row["step"]: row for row in _rows(folder.metrics, notes) if isinstance(row.get("step"), int | float)}
    settings, setting_rows = _settings(folder, notes)
    return RunRecord(
        folder=folder,
        rows=tuple(by_step[step] for step in sorted(by_step)),
        events=tuple(read_event_rows(_rows(folder.events, notes))),
        summary=read_json(folder.summary, notes),
        settings=settings,
        setting_rows=setting_rows,
        notes=tuple(notes),
    )


def launcher_lives(folder: RunFolder) -> bool:
    """Whether the process that holds the run's lock is there (on this machine)."""
    try:
        os.kill(int(folder.lock.read_text().strip()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """The object in a file; None when there is none. What is wrong with it goes into `notes`."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return None
    return found if isinstance(found, dict) else None


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Whole rows; broken lines are left out and counted."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    rows, broken = [], 0
    lines = text.split("\n")
    torn = lines.pop()  # without its newline: still being written, or never finished
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            broken += bool(line.strip())
            continue
        if isinstance(row, dict):
            rows.append(row)
    if torn:
        notes.append(f"the last line of {path.name} is not whole; it was left out")
    if broken:
        notes.append(f"{broken} line{'s' * (broken > 1)} of {path.name} cannot be read; left out")
    return rows


def _settings(folder: RunFolder, notes: list[str]) -> tuple[Settings | None, tuple[SettingRow, ...]]:
    try:
        settings = folder.settings()
    except UserError as error:
        notes.append(f"config.yaml is not one of this program's version ({error})")
    else:
        rows = [SettingRow(path=i.path, value=i.value, meaning=i.meaning, unit=i.unit) for i in describe(settings)]
        return settings, tuple(flat for row in rows for flat in _flat(row.path, row.value, row))
    try:
        values = load_yaml(folder.config)
    except UserError:
        return None, ()
    bare = SettingRow(path="", value=None, meaning="", unit="")
    return None, tuple(_flat("", values, bare))


def _flat(path: str, value: Any, row: SettingRow) -> Sequence[SettingRow]:
    """Mappings as one row a leaf."""
    if isinstance(value, Mapping) and value:
        prefix = f"{path}." if path else ""
        return [leaf for name, inner in value.items() for leaf in _flat(f"{prefix}{name}", inner, row)]
    return [SettingRow(path=path, value=value, meaning=row.meaning, unit=row.unit)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
