"""What the trainer does about alarms: tells of them, and once, if it may, has the run go back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.rollback import Rollback, read_rollback, write_rollback
from async_rl.run_folder import RunFolder
from async_rl.settings import GuardSettings
from async_rl.trainer.alarm import Alarm, CollapseWatch
from async_rl.trainer.manifest import damage_of, list_checkpoints, version_of


class WentBack(Exception):
    """The trainer ends for the run to go on from an earlier checkpoint; `rollback.json` says from which."""


@dataclass(slots=True)
class Guard:
    """Over a whole run."""

    settings: GuardSettings
    folder: RunFolder
    rollback: Rollback | None = None
    """that was made, or is being made"""
    watch: CollapseWatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = CollapseWatch(settings=self.settings)
        self.rollback = read_rollback(self.folder)

    def rebuild(self, rows: Iterable[Mapping[str, float]], version: int) -> None:
        """From the rows of the run so far, `version` steps. Those of steps that were given up are left out, once
        the run has gone back."""
        back = self.rollback if self.rollback is not None and version >= self.rollback.at else None
        for row in rows:
            if row["step"] < version and (back is None or not back.to <= row["step"] < back.at):
                self.look(row)

    def look(self, row: Mapping[str, float]) -> list[Alarm]:
        """The alarms that the row of the newest step raises."""
        return self.watch.look(row) if self.settings.alarms else []

    def columns(self) -> dict[str, float]:
        """Of the metric row."""
        return self.watch.columns() if self.settings.alarms else {}

    def tell(self, alarms: Iterable[Alarm]) -> None:
        for alarm in alarms:
            self.folder.event(
                "alarm",
                signal=alarm.signal,
                step=alarm.step,
                since=alarm.since,
                reason=alarm.reason,
                time=time.time(),
            )

    def goes_back(self, alarms: Iterable[Alarm], step: int) -> bool:
        """Whether the result of this step is to be given up: because of these alarms, or because a life of the run
        that reached it before did so."""
        if self.rollback is not None:
            return self.rollback.at == step + 1
        return self.settings.rollback and any(True for _ in alarms)

    def go_back(self, alarms: Iterable[Alarm], step: int, progress: Mapping[str, Any]) -> WentBack:
        """Note it, for the next launch to begin there, in `rollback.json`. To be raised."""
        if self.rollback is None:
            alarm = next(iter(alarms))
            found = Rollback(
                at=step + 1,
                to=self.good(),
                since=alarm.since,
                signal=alarm.signal,
                reason=f"alarm {alarm.signal}: {alarm.reason}",
                lr_scale=self.settings.rollback_lr_scale,
                progress=progress,
                time=time.time(),
            )
            write_rollback(self.folder, found)
            self.rollback = found
        return WentBack(self.rollback.in_words())

    def good(self) -> int:
        """Version of the newest whole checkpoint from before every sign; 0 (the initial model) when there is none."""
        latest = self.watch.good()
        able = [path for path in list_checkpoints(self.folder.checkpoints) if version_of(path) <= latest]
        return next((version_of(path) for path in reversed(able) if damage_of(path) is None), 0)

    def spared(self) -> Path | None:
        """The checkpoint that must not be deleted for being old: where the run would go back to."""
        if not self.settings.rollback and self.rollback is None:
            return None
        latest = self.watch.good() if self.rollback is None else self.rollback.to
        able = [path for path in list_checkpoints(self.folder.checkpoints) if version_of(path) <= latest]
        return able[-1] if able else None
