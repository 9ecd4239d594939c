"""The terminal during a run: one line a step, a progress bar, and the story in words at the end."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from async_rl.config import Settings, pace_of
from async_rl.events import (
    AlarmRaised,
    CanarySilent,
    DepthChanged,
    EvaluationReported,
    Event,
    GeneratorDied,
    GeneratorGivenUp,
    GeneratorJoined,
    GeneratorLeft,
    GeneratorLost,
    GeneratorQuarantined,
    GeneratorRejoined,
    MismatchFound,
    ProblemRefused,
    RewardsNotRepeatable,
    StallReported,
    StepSkipped,
    TrackerFailed,
    TrainerAwaited,
    TrainerReady,
    TrajectoryDoubted,
)
from async_rl.observe.answers import answer_lines
from async_rl.observe.conclusion import conclusion, in_steps, summary_rows
from async_rl.observe.verification_lines import verification_line


class LastingConsole(RichConsole):
    """A console that goes quiet when nothing more can be written to it, because its reader has gone or a disk is full:
    the record of a run is in its folder, and the run goes on."""

    lost: str = ""
    """why nothing is written any more; empty: all is well"""

    def on_broken_pipe(self) -> None:
        """Called by rich, which would end the program."""
        self.give_up("its reader has gone")

    def give_up(self, reason: str) -> None:
        """Write nothing from now on; what is still buffered must not fail again when the interpreter ends."""
        self.lost, self.quiet = reason, True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class Console:
    """Where a run shows itself. `quiet` keeps the lines of steps back, `silent` everything.

    On a terminal the lines of steps take the columns that fit its width, and their header comes again after a
    screenful. A file gets the full lines and one header.
    """

    def __init__(self, *, quiet: bool = False, silent: bool = False, out: RichConsole | None = None) -> None:
        self._out = out or LastingConsole(highlight=False, quiet=silent)
        self._quiet = quiet
        self._progress: Progress | None = None
        self._task: Any = None
        self._last: Mapping[str, Any] | None = None
        self._layout: Layout | None = None
        """of the header printed last"""
        self._lines = 0
        """printed since that header"""
        self._skipped: Counter[str] = Counter()
        """steps that changed nothing, by reason"""

    def print(self, text: str, *, indent: int = 0) -> None:
        """A terminal gets its lines broken between words, later lines `indent` further in; a file gets them whole."""
        if self._out.is_terminal:
            text = "\n".join(_broken(line, self._out.width, indent) for line in text.split("\n"))
        self._lines += text.count("\n") + 1
        try:
            self._out.print(text, markup=False, soft_wrap=True)
        except OSError as error:
            if not isinstance(self._out, LastingConsole):
                raise
            self._out.give_up(error.strerror or str(error))

    @property
    def lost(self) -> str:
        """Why nothing is shown any more; empty: all is well."""
        return self._out.lost if isinstance(self._out, LastingConsole) else ""

    def start(self, settings: Settings, folder: Path, notes: Iterable[str]) -> None:
        """Print what is run, where, and every note; begin the progress bar."""
        depth, window = pace_of(settings)
        window_text = f", window {window}" if settings.staleness.policy == "pace" else ""
        batch, stale, generators = settings.batch, settings.staleness, settings.generator.count
        trainer = settings.trainer
        ranks = f" ({trainer.ranks} ranks, sharding {trainer.sharding})" if trainer.ranks > 1 else ""
        self.print(
            f"run {folder}: task {settings.task.name}, recipe {settings.recipe.get('name')}, "
            f"{generators or 'no'} generator{'s' * (generators != 1)} + buffer + trainer{ranks}\n"
            f"{batch.groups_per_step} groups x {batch.group_size} trajectories a step; max_staleness "
            f"{stale.max_staleness}, policy {stale.policy}, pipeline_depth {depth:g}{window_text}"
        )
        if not generators:
            self.print(f"generators join by themselves: async-rl generate --run {folder}")
        for note in notes:
            self.print(f"note: {note}")
        self._layout = None
        self._print_header()
        self._progress = progress_bar(self._out)
        self._task = self._progress.add_task("starting", total=settings.trainer.steps)
        self._progress.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """One line for one metric row."""
        if self._progress is not None:
            done = int(row["step"]) + 1
            last = done == self._progress.tasks[0].total
            self._progress.update(self._task, completed=done, description="evaluating" if last else "training")
        self._print_header()
        if self._layout is not None:
            self.print(step_line(row, self._last, self._layout, self._out.width if self._out.is_terminal else None))
        self._last = row

    def _print_header(self) -> None:
        """At the start, after a screenful, and when the terminal has another width."""
        if self._quiet:
            return
        layout = layout_for(self._out.width) if self._out.is_terminal else FULL
        screenful = self._out.is_terminal and self._lines >= self._out.height - ROOM_BELOW
        if layout != self._layout or screenful:
            self.print(layout.header())
            self._layout, self._lines = layout, 0

    def event(self, event: Event) -> None:
        """Print what is worth a line: evaluations, alarms, generators that died."""
        match event:
            case TrainerReady() if self._progress is not None:
                self._progress.update(self._task, description="evaluating")
            case TrainerAwaited():
                self.print(f"the run waits for its trainer; start it with: {event.command}")
            case EvaluationReported():
                self.print(evaluation_line(event))
            case CanarySilent():
                self.print(
                    f"step {event.step}: {event.name} has not shown since step {event.since_step} "
                    f"that its weights are those published"
                )
            case TrackerFailed():
                self.print(f"{event.name}: {event.reason}; the run goes on without it")
            case GeneratorDied():
                self.print(
                    f"{event.reason}\n{event.name} is started again in {event.restart_in_s:g} s "
                    f"(death {event.deaths}; {event.max_restarts} restarts are allowed)"
                )
            case GeneratorLost():
                self.print(
                    f"{event.name} gave no sign of life for {event.silent_s:.1f} s, its {len(event.groups)} "
                    f"groups go to others; {event.reason}"
                )
            case GeneratorJoined():
                self.print(f"{event.name} has joined")
            case GeneratorLeft():
                groups = len(event.groups)
                self.print(f"{event.name} has left ({event.reason}), its {groups} groups go to others")
            case GeneratorRejoined():
                self.print(f"{event.name} is back; it begins anew with {event.episodes_dropped} episodes dropped")
            case StallReported():
                self.print(event.text)
            case DepthChanged():
                self.print(
                    f"step {event.step}: pipeline depth {event.old:g} -> {event.new:g}, since "
                    f"{event.reason} (smoothed {event.smoothed:.3f})"
                )
            case ProblemRefused():
                self.print(f"{event.reason}; it is refused from now on")
            case TrajectoryDoubted() | GeneratorQuarantined() | GeneratorGivenUp() | RewardsNotRepeatable():
                self.print(verification_line(event))
            case AlarmRaised():
                self.print(f"ALARM {event.signal} at step {event.step}: {event.reason}")
            case MismatchFound():
                self.print(f"step {event.step}: {event.reason}; {event.remedy}")
            case StepSkipped():
                kind = re.sub(r"[\d.]+", "N", event.reason)
                self._skipped[kind] += 1
                if self._skipped[kind] == 1:  # sparse rewards skip many steps; their lines say so
                    self.print(f"step {event.step} changed nothing: {event.reason}; later ones say `no step`")

    def stop(self) -> None:
        """End the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The end of a run in a table and in words."""
        rows = summary_rows(summary)
        if skipped := self._skipped.total():
            rows.append(("without an update", f"{skipped} of {summary['steps']} steps changed nothing"))
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.print(f"{name:<{width}}  {value}", indent=width + 2)
        for line in answer_lines(summary.get("answers", ())):
            self.print(line)
        self.print(conclusion(summary))


def _broken(line: str, width: int, indent: int) -> str:
    """`line` broken between words; words that are longer (paths) stay whole."""
    if len(line) <= width:
        return line
    pieces = textwrap.wrap(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False,
        drop_whitespace=True, replace_whitespace=False,
    )  # fmt: skip
    return "\n".join(pieces)


def progress_bar(out: RichConsole) -> Progress:
    """What is done, of how much, since when, how long yet. It leaves nothing behind, and a file never sees it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    )


# ---------------------------------------------------------------------- lines of steps

ROOM_BELOW = 4
"""lines of a screen that the header and the progress bar take"""
GAP = "  "


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One metric row, and how long its step took from the end of the one before."""

    row: Mapping[str, Any]
    seconds: float

    def number(self, key: str) -> float:
        """A metric; NaN where the row lacks it."""
        return float(self.row.get(key, float("nan")))

    @property
    def skipped(self) -> bool:
        """True when the step changed no weight."""
        return bool(self.row.get("skipped"))

    @property
    def learning_rate_factor(self) -> float:
        """Effective learning rate over that of the schedule."""
        base = self.row.get("lr/base")
        return self.row.get("lr/effective", 0.0) / base if base else 0.0


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the lines of steps. Example: `Column("tokens/s", "", 8, lambda s: ...)`."""

    top: str
    below: str
    """second line of the header"""
    width: int
    cell: Callable[[StepRow], str]
    left: bool = False
    """text begins at the left edge; numbers end at the right one"""

    def aligned(self, text: str) -> str:
        return f"{text:<{self.width}}" if self.left else f"{text:>{self.width}}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a line."""

    columns: tuple[Column, ...]

    @property
    def width(self) -> int:
        return sum(column.width for column in self.columns) + len(GAP) * (len(self.columns) - 1)

    def header(self) -> str:
        """Two lines."""
        top, below = (
            GAP.join(column.aligned(text) for column, text in zip(self.columns, texts, strict=True)).rstrip()
            for texts in ([c.top for c in self.columns], [c.below for c in self.columns])
        )
        return f"{top}\n{below}"

    def line(self, step: StepRow) -> str:
        return GAP.join(column.aligned(column.cell(step)) for column in self.columns).rstrip()


def figure(value: float, width: int, decimals: int = 3) -> str:
    """A number in at most `width` characters where that can be, with fewer decimals the larger it is."""
    if isnan(value):
        return "-"
    if value and abs(value) < 0.5 * 10**-decimals:
        return f"{value:.0e}"
    texts = (f"{value:.{d}f}" for d in range(decimals, -1, -1))
    return next((text for text in texts if len(text) <= width), f"{value:.0e}")


def _metric(top: str, below: str, width: int, key: str, decimals: int = 3) -> Column:
    return Column(top, below, width, lambda step: figure(step.number(key), width, decimals))


def _staleness(slash: str) -> Callable[[StepRow], str]:
    return lambda step: f"{figure(step.number('lag/mean'), 5, 2):>5}{slash}{figure(step.number('lag/max'), 3, 0):<3}"


def _learning_rate(width: int) -> Callable[[StepRow], str]:
    """The factor on the scheduled rate; `critic` while the critic alone is trained."""

    def cell(step: StepRow) -> str:
        if step.row.get("critic/warmup"):
            return "critic"
        return "no step" if step.skipped else figure(step.learning_rate_factor, width)

    return cell


def _gradient(width: int) -> Callable[[StepRow], str]:
    return lambda step: figure(step.row.get("grad/norm", float("nan") if step.skipped else 0.0), width)


def _waits(step: StepRow) -> str:
    """The side that stood still during this step, and for what share of it."""
    share = _trainer_waits(step)
    if share is not None:
        return f"trainer for data {share:3.0%}"
    return "generators for slots" if _slots_are_full(step) else "nobody"


def _waits_in_short(step: StepRow) -> str:
    share = _trainer_waits(step)
    if share is not None:
        return f"trainer {share:3.0%}"
    return "generators" if _slots_are_full(step) else "nobody"


def _trainer_waits(step: StepRow) -> float | None:
    waited = step.row["time/wait_for_batch"] / max(step.seconds, 1e-9)
    return min(1.0, float(waited)) if waited >= 0.02 else None


def _slots_are_full(step: StepRow) -> bool:
    return bool(step.row["slots/used"] >= step.row["slots/all"])


def _tokens_per_second(step: StepRow) -> str:
    return f"{step.row['tokens/trained'] / max(step.seconds, 1e-9):.0f}"


STEP = Column("step", "", 6, lambda step: str(int(step.row["step"])))
REWARD = _metric("reward", "", 6, "reward/mean")
FULL = Layout(
    (
        STEP,
        REWARD,
        Column("staleness", "mean / max", 11, _staleness(" / "), left=True),
        _metric("ESS", "", 7, "ess/ratio"),
        Column("learning", "rate x", 8, _learning_rate(8)),
        Column("gradient", "norm", 8, _gradient(8)),
        Column("who waits for whom", "", 21, _waits, left=True),
        Column("tokens/s", "", 8, _tokens_per_second),
        Column("seconds", "", 7, lambda step: figure(step.seconds, 7, 2)),
    )
)
"""also what a file gets"""
EXTRA = (
    _metric("length", "tokens", 6, "len/mean", 1),
    _metric("entropy", "nats", 8, "entropy"),
    _metric("no signal", "of groups", 9, "group/zero_signal", 2),
    _metric("clipped", "tokens", 7, "clip/frac"),
)
"""further columns, as far as the terminal is wide"""
NARROW = (
    STEP,
    REWARD,
    Column("staleness", "mean/max", 9, _staleness("/"), left=True),
    _metric("ESS", "", 5, "ess/ratio"),
    Column("lr x", "", 7, _learning_rate(5)),
    Column("grad", "", 6, _gradient(6)),
    Column("who waits", "", 12, _waits_in_short, left=True),
    Column("tok/s", "", 6, _tokens_per_second),
    Column("s", "", 5, lambda step: figure(step.seconds, 5, 2)),
)
"""columns for 80 characters; a narrower terminal gets the first of them"""
HEADER = FULL.header()
MARK = " !"
"""an alarm, behind a line that has no room for its name"""


def layout_for(width: int) -> Layout:
    """The columns that fit a terminal of `width` characters, and the mark of an alarm behind them."""
    width -= len(MARK)
    if width < FULL.width:
        count = len(NARROW)
        while count > 1 and Layout(NARROW[:count]).width > width:
            count -= 1
        return Layout(NARROW[:count])
    layout = FULL
    for column in EXTRA:
        wider = Layout((*layout.columns, column))
        if wider.width <= width:
            layout = wider
    return layout


def step_line(
    row: Mapping[str, Any], before: Mapping[str, Any] | None, layout: Layout = FULL, width: int | None = None
) -> str:
    """One step: reward, staleness, ESS, learning-rate factor, who waits for whom, tokens/s; alarms and failed episodes
    behind them.

    `before`: the row of the step before; `width`: of the terminal, where alarms that do not fit are a `!`, and the
    reason of a failed episode is cut.
    """
    seconds = row["time"] - before["time"] if before else row["time/step"] + row["time/wait_for_batch"]
    line = layout.line(StepRow(row=row, seconds=seconds))
    alarms = [name.removeprefix("alarm/") for name, raised in row.items() if name.startswith("alarm/") and raised]
    if alarms:
        told = f"{line}  ALARM {', '.join(alarms)}"
        line = told if width is None or len(told) <= width else f"{line}{MARK}"
    return _with_failures(line, row, width) if row.get("episodes/failed") else line


LEAST_REASON = 24
"""fewest characters of a reason behind a step; where there is no room for them, the reason gets a line of its own"""


def _with_failures(line: str, row: Mapping[str, Any], width: int | None) -> str:
    """`line` and the share of the episodes that failed since the step before, with the reason of the newest."""
    told = f"{row['episodes/failed']:.0%} failed: {row.get('episodes/failure', '')}".removesuffix(": ")
    if width is None:
        return f"{line}  {told}"
    room = width - len(line) - len(GAP)
    if room >= min(len(told), LEAST_REASON):
        return f"{line}{GAP}{_shortened(told, room)}"
    return f"{line}\n{GAP}{_shortened(told, width - len(GAP))}"


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def evaluation_line(event: EvaluationReported) -> str:
    """Held-out reward, and which weights sampled it (new ones may come in the middle of an evaluation)."""
    step, oldest, newest = event.step, event.version_min, event.version_max
    when = f"after {in_steps(step)}" if step else "before training"
    weights = f"weights {oldest}" if oldest == newest else f"weights {oldest} to {newest}"
    parts = "".join(f", {name} {value:.3f}" for name, value in event.parts.items())
    weights = f"{weights}{parts}"
    if not event.failed:
        return f"held-out reward {event.reward:.3f} {when} ({event.trajectories} episodes, {weights})"
    failed = f"{event.failed} of {event.trajectories} episodes failed: {'; '.join(event.failures)}"
    if event.failed == event.trajectories:
        return f"no held-out reward {when}: {failed} ({weights})"
    left = event.trajectories - event.failed
    return f"held-out reward {event.reward:.3f} {when} ({left} episodes, {weights}); {failed}"
