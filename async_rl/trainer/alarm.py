"""The watch for a collapse (`CollapseWatch`: metric rows in, alarms out), and what the trainer does about it (`Guard`).

Five signals are averaged over a window of steps (the median; of the reward the mean) and compared with what the run
itself has shown before: effective sample size, the reference that this is measured by, entropy, gradient norm, reward.
An alarm stays raised, because some signals look healthy again after a collapse: a policy that always says the same has
an ESS of 1. It is withdrawn when the watch begins anew: after a rollback, or when a resumed run goes on from before it.

`CollapseWatch` is pure, without clock or file: its state is a function of the rows, so a resumed run rebuilds it from
metrics.jsonl. What the thresholds catch, how early, and how often they are wrong was measured on recorded trainings:
bench/LAB.md. `Guard` records alarms, and once, where the settings allow it, makes the run go back to a checkpoint.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, isnan, log
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, get_args

from async_rl.config import GuardSettings
from async_rl.events import AlarmRaised
from async_rl.run_folder import Rollback, RunFolder, read_rollback, write_rollback
from async_rl.trainer.manifest import damage_of, list_checkpoints, version_of

Signal = Literal["ess", "reference", "entropy", "gradient", "reward"]
SIGNALS: tuple[Signal, ...] = get_args(Signal)
KEYS: dict[Signal, str] = {
    "ess": "ess/ratio", "reference": "ess/noise", "entropy": "entropy", "gradient": "grad/norm",
    "reward": "reward/mean",
}  # fmt: skip

FIRST = 3
"""steps that show how a run began when it collapses within the first window"""
LEAST_LOSS = 0.5
"""share of the ESS of fresh data that must be gone for an alarm, however small the batch"""
FEWEST = 2.0
"""effective samples below which one or two decide a step, whatever the size of the batch"""
DEAD = 10.0
"""an entropy so many times below that of the start leaves nothing to explore"""
NOISE = 8.0
"""standard errors that a loss of reward must have: the best of thousands of windows lies three above their mean,
the worst three below"""
MANY_WINDOWS = 20
"""over which the noise of the reward is measured, and what is usual"""
TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One signal, once."""

    signal: Signal
    step: int
    """whose row raised it"""
    since: int
    """the first sign: the first step of the window in which the signal was half-way from where it usually is to its
    threshold, without coming back"""
    reason: str
    """a sentence with the numbers"""


@dataclass(slots=True, kw_only=True)
class Course:
    """One signal of a run: its start, and where it is now."""

    window: int
    """steps"""
    average: Callable[[Iterable[float]], float] = median
    """over a window"""
    start: list[float] = field(default_factory=list)
    """the first window of values"""
    recent: deque[float] = field(init=False)
    """the last window of values"""
    steps: deque[int] = field(init=False)
    """steps of the values in `recent`"""
    well: int = -1
    """newest step at which it was nearer to where it usually is than to its threshold"""
    worries: deque[float] = field(init=False)
    """how far the signal was on the way from its start to its threshold, step by step"""

    def __post_init__(self) -> None:
        self.recent, self.steps = deque(maxlen=self.window), deque(maxlen=self.window)
        self.worries = deque(maxlen=MANY_WINDOWS * self.window)

    def add(self, step: int, value: float) -> None:
        if not self.started:
            self.start.append(value)
        self.recent.append(value)
        self.steps.append(step)

    @property
    def started(self) -> bool:
        """Whether the start is over, so that values can be compared with it."""
        return len(self.start) == self.window

    @property
    def full(self) -> bool:
        return len(self.recent) == self.window

    @property
    def begun(self) -> float:
        return self.average(self.start)

    @property
    def first(self) -> list[float]:
        """The first values, before anything can have gone wrong."""
        return self.start[:FIRST]

    @property
    def now(self) -> float:
        return self.average(self.recent)

    def judge(self, step: int, worry: float) -> None:
        """Note how far the signal is on its way to its threshold; `worry`: 0 .. 1 and beyond.

        At a large lag an ESS may well stay half-way: then that is usual, and no sign of a collapse.
        """
        usual = median(self.worries) if self.worries else 0.0
        if worry < max(0.5, (1 + usual) / 2):
            self.well = step
        self.worries.append(worry)

    def since(self, step: int = -1) -> int:
        """The first step of the first window that was no longer well. A signal without a sign of trouble (its last
        value was well, or it has too few values to be judged) answers with the last window up to `step`."""
        silent = not self.worries or self.well == self.steps[-1]
        return max(0, (max(self.well, step) if silent else self.well) + 2 - self.window)


@dataclass(slots=True, kw_only=True)
class CollapseWatch:
    """All signals of a run, and the alarms that they have raised."""

    settings: GuardSettings
    courses: dict[Signal, Course] = field(init=False)
    raised: dict[Signal, Alarm] = field(default_factory=dict)
    best: float = -inf
    """highest reward of a window"""
    lowest: float = 0.0
    """lowest reward of a batch, 0 at most: what a collapse may fall to"""
    changes: deque[float] = field(init=False)
    """of the reward from one step to the next"""
    step: int = -1
    """newest step that was checked"""

    def __post_init__(self) -> None:
        # rewards are few numbers of small batches, and none of them is far off: a mean
        averages = {signal: fmean if signal == "reward" else median for signal in SIGNALS}
        self.courses = {signal: Course(window=self.settings.window, average=averages[signal]) for signal in SIGNALS}
        self.changes = deque(maxlen=MANY_WINDOWS * self.settings.window)

    def check(self, row: Mapping[str, float]) -> list[Alarm]:
        """Add the next metric row; returns the alarms that it raises."""
        step = self.step = int(row["step"])
        self._add(row, step)
        new = []
        for signal, course in self.courses.items():
            if signal in self.raised or not course.full or course.steps[-1] != step:
                continue
            worry, why = self._worry(signal, course, row)
            course.judge(step, worry)
            if worry >= 1:
                alarm = Alarm(signal=signal, step=step, since=course.since(), reason=f"{why}, {self._over(course)}")
                self.raised[signal] = alarm
                new.append(alarm)
        return new

    def columns(self) -> dict[str, float]:
        """The columns alarm/* of the step's metric row."""
        return {f"alarm/{signal}": float(signal in self.raised) for signal in SIGNALS}

    def newest_safe_version(self) -> int:
        """The newest version that lies a window before every sign so far: the run would go back to it, should an alarm
        be raised at the next step."""
        signs = [alarm.since for alarm in self.raised.values()]
        signs += [
            course.since(self.step) for signal, course in self.courses.items() if self._watched(signal) and course.steps
        ]
        return max(0, min(signs, default=0) - self.settings.window)

    def _watched(self, signal: Signal) -> bool:
        return bool(getattr(self.settings, signal)) and signal not in self.raised

    def _add(self, row: Mapping[str, float], step: int) -> None:
        warming = bool(row.get("critic/warmup"))  # the policy does not move
        for signal, course in self.courses.items():
            value = row.get(KEYS[signal])
            if signal == "gradient" and not warming:
                # a step that was skipped had no gradient, or one that is not finite
                value = 0.0 if value is None else inf if isnan(value) else value
            if value is None or isnan(value) or not getattr(self.settings, signal) or (warming and signal != "reward"):
                continue
            if signal == "reward":
                if course.recent:
                    self.changes.append(value - course.recent[-1])
                self.lowest = min(self.lowest, value)
            course.add(step, value)

    def _worry(self, signal: Signal, course: Course, row: Mapping[str, float]) -> tuple[float, str]:
        """How far the signal is on its way to its threshold, 0 .. 1 and beyond, and a sentence of what it is and
        was."""
        match signal:
            case "ess":
                return self._ess(course, row)
            case "reference":
                return course.now / self.settings.reference, (
                    f"ess/noise {course.now:.3g}, above {self.settings.reference:g}: log-weights of fresh data spread "
                    "beyond what the run's start allows, so generators report what they did not sample, or their "
                    "engine has changed"
                )
            case "reward":
                return self._reward(course)
            case "entropy":
                return self._ratio(course, "entropy", self.settings.entropy, max(self.settings.entropy, DEAD))
            case "gradient":
                return self._ratio(course, "grad/norm", self.settings.gradient, self.settings.gradient)

    def _ess(self, course: Course, row: Mapping[str, float]) -> tuple[float, str]:
        now = course.now
        # the first data are fresh; of long answers the ESS may be small even then
        fresh = max(min(max(course.first), row.get("ess/reference", 1.0)), TINY)
        units = row["ess/size"] / row["ess/ratio"] if row.get("ess/size") and row["ess/ratio"] > 0 else inf
        limit = min(max(self.settings.ess * fresh, FEWEST / units), LEAST_LOSS * fresh)
        why = f"ess/ratio {now:.3g}, below {limit:.3g} (of fresh data {fresh:.3g})"
        return _share(log(fresh / max(now, TINY)), log(fresh / limit)), why

    def _ratio(self, course: Course, key: str, above: float, below: float) -> tuple[float, str]:
        """The worry of a signal that may leave its start in both directions; `above`, `below`: factors on the start."""
        if not course.started:
            return 0.0, ""
        begun, now = course.begun, course.now
        moved = inf if now == inf else log(max(now, TINY) / max(begun, TINY))
        if moved >= 0:
            return _share(moved, log(above)), f"{key} {now:.3g}, above {above:g} times the {begun:.3g} of the start"
        reward = self.courses["reward"]
        if reward.full and reward.now > reward.begun:
            return 0.0, ""  # less of it is what learning brings
        return _share(-moved, log(below)), (
            f"{key} {now:.3g}, below 1/{below:g} of the {begun:.3g} of the start, and the reward has not risen"
        )

    def _reward(self, course: Course) -> tuple[float, str]:
        now = course.now
        self.best = max(self.best, now, fmean(course.first))
        # two independent values differ by twice the variance of one
        noise = (fmean(change * change for change in self.changes) / 2) ** 0.5
        error = noise / self.settings.window**0.5
        limit = max(self.settings.reward * (self.best - self.lowest), NOISE * error)
        why = f"reward/mean {now:.3g}, more than {limit:.3g} below its best {self.best:.3g}"
        return _share(self.best - now, limit), why

    def _over(self, course: Course) -> str:
        return f"over steps {course.steps[0]} to {course.steps[-1]}"


def _share(moved: float, limit: float) -> float:
    """moved / limit, 0 at least; 0 where the limit is 0, since no reward is above its lowest then."""
    return max(0.0, moved / limit) if limit > TINY else 0.0


def watch(settings: GuardSettings, rows: Iterable[Mapping[str, float]]) -> CollapseWatch:
    """The watch after these rows."""
    found = CollapseWatch(settings=settings)
    for row in rows:
        found.check(row)
    return found


class RolledBack(Exception):
    """Ends the trainer, so that the run goes on from an earlier checkpoint; `rollback.json` says from which."""


@dataclass(slots=True)
class Guard:
    """What the trainer does about alarms, over a whole run."""

    settings: GuardSettings
    folder: RunFolder
    rollback: Rollback | None = None
    """the run's rollback, made or being made"""
    watch: CollapseWatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = CollapseWatch(settings=self.settings)
        self.rollback = read_rollback(self.folder)

    def rebuild(self, rows: Iterable[Mapping[str, float]], version: int) -> None:
        """Rebuild the watch from the rows of the run so far, `version` steps.

        Once the run has gone back, rows of steps that were given up are left out.
        """
        back = self.rollback if self.rollback is not None and version >= self.rollback.at else None
        for row in rows:
            if row["step"] < version and (back is None or not back.to <= row["step"] < back.at):
                self.check(row)

    def check(self, row: Mapping[str, float]) -> list[Alarm]:
        """The alarms that the row of the newest step raises."""
        return self.watch.check(row) if self.settings.alarms else []

    def columns(self) -> dict[str, float]:
        """The columns of the step's metric row."""
        return self.watch.columns() if self.settings.alarms else {}

    def report(self, alarms: Iterable[Alarm]) -> None:
        """Record the alarms as events of the run."""
        for alarm in alarms:
            self.folder.record(
                AlarmRaised(signal=alarm.signal, step=alarm.step, since=alarm.since, reason=alarm.reason)
            )

    def gives_up(self, alarms: Iterable[Alarm], step: int) -> bool:
        """Whether the result of this step is given up: because of these alarms, or because an earlier launch of the run
        that reached the step did so."""
        if self.rollback is not None:
            return self.rollback.at == step + 1
        return self.settings.rollback and any(True for _ in alarms)

    def roll_back(self, alarms: Iterable[Alarm], step: int, progress: Mapping[str, Any]) -> RolledBack:
        """Write `rollback.json`, by which the next launch begins there. Returns the exception to raise."""
        if self.rollback is None:
            alarm = next(iter(alarms))
            found = Rollback(
                at=step + 1,
                to=self.rollback_target(),
                since=alarm.since,
                signal=alarm.signal,
                reason=f"alarm {alarm.signal}: {alarm.reason}",
                lr_scale=self.settings.rollback_lr_scale,
                progress=progress,
                time=time.time(),
            )
            write_rollback(self.folder, found)
            self.rollback = found
        return RolledBack(self.rollback.describe())

    def rollback_target(self) -> int:
        """The version to go back to: the newest whole checkpoint from before every sign; 0 (the initial model) when
        there is none."""
        latest = self.watch.newest_safe_version()
        able = [path for path in list_checkpoints(self.folder.checkpoints) if version_of(path) <= latest]
        return next((version_of(path) for path in reversed(able) if damage_of(path) is None), 0)

    def protected_checkpoint(self) -> Path | None:
        """The checkpoint that must not be deleted though it is old, because the run would go back to it."""
        if not self.settings.rollback and self.rollback is None:
            return None
        latest = self.watch.newest_safe_version() if self.rollback is None else self.rollback.to
        able = [path for path in list_checkpoints(self.folder.checkpoints) if version_of(path) <= latest]
        return able[-1] if able else None
