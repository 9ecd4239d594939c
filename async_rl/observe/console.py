"""The terminal during a run: one line a step, a progress bar, and the story in words at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    GeneratorJoined,
    GeneratorLeft,
    GeneratorLost,
    GeneratorRejoined,
    StallReported,
    StepSkipped,
    TrackerFailed,
    TrainerAwaited,
    TrainerReady,
)

# -------------------- progress
# The bar at the bottom of the terminal.


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


HEADER = (
    "  step  reward  staleness         ESS  learning  gradient  who waits for whom    tokens/s  seconds\n"
    "                mean / max               rate x      norm"
)


CHANGE = 0.06
"""of the held-out reward, from which on it is called one: about two standard errors of an evaluation of 256 episodes"""


class Console:
    """Where a run shows itself. `quiet` keeps the lines of steps back, `silent` everything."""

    def __init__(self, *, quiet: bool = False, silent: bool = False) -> None:
        self._out = RichConsole(highlight=False, quiet=silent)
        self._quiet = quiet
        self._progress: Progress | None = None
        self._task: Any = None
        self._last: Mapping[str, Any] | None = None

    def say(self, text: str) -> None:
        self._out.print(text, markup=False, soft_wrap=True)

    def start(self, settings: Settings, folder: Path, notes: Iterable[str]) -> None:
        depth, window = pace_of(settings)
        window_text = f", window {window}" if settings.staleness.policy == "pace" else ""
        batch, stale, generators = settings.batch, settings.staleness, settings.generator.count
        trainer = settings.trainer
        ranks = f" ({trainer.ranks} ranks, sharding {trainer.sharding})" if trainer.ranks > 1 else ""
        self.say(
            f"run {folder}: task {settings.task.name}, recipe {settings.recipe.get('name')}, "
            f"{generators or 'no'} generator{'s' * (generators != 1)} + buffer + trainer{ranks}\n"
            f"{batch.groups_per_step} groups x {batch.group_size} trajectories a step; max_staleness "
            f"{stale.max_staleness}, policy {stale.policy}, pipeline_depth {depth:g}{window_text}"
        )
        if not generators:
            self.say(f"generators join by themselves: async-rl generate --run {folder}")
        for note in notes:
            self.say(f"note: {note}")
        if not self._quiet:
            self.say(HEADER)
        self._progress = progress_bar(self._out)
        self._task = self._progress.add_task("starting", total=settings.trainer.steps)
        self._progress.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """One line for one metric row."""
        if self._progress is not None:
            done = int(row["step"]) + 1
            last = done == self._progress.tasks[0].total
            self._progress.update(self._task, completed=done, description="evaluating" if last else "training")
        if not self._quiet:
            self.say(step_line(row, self._last))
        self._last = row

    def event(self, event: Event) -> None:
        """Say what is worth saying: evaluations, skipped steps, generators that died."""
        match event:
            case TrainerReady() if self._progress is not None:
                self._progress.update(self._task, description="evaluating")
            case TrainerAwaited():
                self.say(f"the run waits for its trainer; start it with: {event.command}")
            case EvaluationReported():
                self.say(evaluation_line(event))
            case CanarySilent():
                self.say(
                    f"step {event.step}: {event.name} has not shown since step {event.since_step} "
                    f"that its weights are those published"
                )
            case TrackerFailed():
                self.say(f"{event.name}: {event.reason}; the run goes on without it")
            case GeneratorDied():
                self.say(
                    f"{event.reason}\n{event.name} is started again in {event.restart_in_s:g} s "
                    f"(death {event.deaths}; {event.max_restarts} restarts are allowed)"
                )
            case GeneratorLost():
                self.say(
                    f"{event.name} gave no sign of life for {event.silent_s:.1f} s, its {len(event.groups)} "
                    f"groups go to others; {event.reason}"
                )
            case GeneratorJoined():
                self.say(f"{event.name} has joined")
            case GeneratorLeft():
                groups = len(event.groups)
                self.say(f"{event.name} has left ({event.reason}), its {groups} groups go to others")
            case GeneratorRejoined():
                self.say(f"{event.name} is back; it begins anew with {event.episodes_dropped} episodes dropped")
            case StallReported():
                self.say(event.text)
            case DepthChanged():
                self.say(
                    f"step {event.step}: pipeline depth {event.old:g} -> {event.new:g}, since "
                    f"{event.reason} (smoothed {event.smoothed:.3f})"
                )
            case AlarmRaised():
                self.say(f"ALARM {event.signal} at step {event.step}: {event.reason}")
            case StepSkipped():
                self.say(f"step {event.step} changed nothing: {event.reason}")

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The end of a run in a table and in words."""
        rows = summary_rows(summary)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:  # not a table, which would break lines where the output is no terminal
            self.say(f"{name:<{width}}  {value}")
        self.say(in_words(summary))


def evaluation_line(event: EvaluationReported) -> str:
    """Held-out reward, and which weights sampled it (new ones may come in the middle of an evaluation)."""
    step, oldest, newest = event.step, event.version_min, event.version_max
    when = f"after {step} step{'s' * (step > 1)}" if step else "before training"
    weights = f"weights {oldest}" if oldest == newest else f"weights {oldest} to {newest}"
    return f"held-out reward {event.reward:.3f} {when} ({event.trajectories} episodes, {weights})"


def step_line(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """reward, staleness, ESS, learning-rate factor, who waits for whom, tokens/s."""
    seconds = row["time"] - before["time"] if before else row["time/step"] + row["time/wait_for_batch"]
    rate = row["tokens/trained"] / max(seconds, 1e-9)
    factor = row.get("lr/effective", 0.0) / row["lr/base"] if row.get("lr/base") else 0.0
    alarms = [name.removeprefix("alarm/") for name, raised in row.items() if name.startswith("alarm/") and raised]
    return (
        f"{int(row['step']):6d}  {row['reward/mean']:6.3f}  {row['lag/mean']:5.2f} / {int(row['lag/max']):<3d}  "
        f"{row.get('ess/ratio', float('nan')):8.3f}  {factor:8.3f}  {row.get('grad/norm', 0.0):8.3f}  "
        f"{who_waits(row, seconds):<20s}  {rate:8.0f}  {seconds:7.2f}"
        f"{'  ALARM ' if alarms else ''}{', '.join(alarms)}"
    )


def who_waits(row: Mapping[str, Any], seconds: float) -> str:
    """The side that stood still during this step, and for what share of it."""
    waited = row["time/wait_for_batch"] / max(seconds, 1e-9)
    if waited >= 0.02:
        return f"trainer for data {min(1.0, waited):3.0%}"
    full = row["slots/used"] >= row["slots/all"]
    return "generators for slots" if full else "nobody"


def summary_rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            "held-out reward",
            f"{s['reward_eval_first']:.3f} before, {s['reward_eval_last']:.3f} after {s['steps']} steps",
        ),
        ("staleness", f"mean {s['lag_mean']:.2f}, max {s['lag_max']}, bound {s['max_staleness']} steps"),
        *staleness_rows(s),
        ("effective sample size", f"{s['ess_mean']:.3f} of the batch on average"),
        (
            "time",
            f"{s['seconds']:.1f} s of training steps ({s['seconds_training']:.1f} s training, "
            f"{s['seconds_generating']:.1f} s generating), {s['seconds_with_start']:.1f} s in all",
        ),
        ("overlap", f"{s['overlap_efficiency']:.2f} (1 when the slower side never waits)"),
        ("tokens", f"{s['tokens_generated']} generated, {s['tokens_trained']} trained"),
        (
            "groups",
            f"{s['groups_admitted']} admitted, {s['groups_trained']} trained, {s['groups_refused']} refused, "
            f"{s['trajectories_failed']} trajectories failed",
        ),
        *alarm_rows(s),
        ("weights", weights_checked(s["canary"])),
        ("model", str(s["model"])),
    ]


def alarm_rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Signs of a collapse, and that the run went back."""
    rows = [("went back", back["text"])] if (back := s.get("rollback")) else []
    return rows + [
        (f"ALARM {alarm['signal']}", f"at step {alarm['step']}: {alarm['reason']}") for alarm in s.get("alarms", ())
    ]


def staleness_rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What keeping the bound has cost."""
    rows = []
    held, dropped = s["held_up"], s["dropped"]
    if held.get("batches"):
        by = [f"{name.removeprefix('by/')} {count:g}" for name, count in held.items() if name.startswith("by/")]
        what = f"{held['batches']:g} batches waited {held['seconds']:.1f} s for running groups ({', '.join(by)})"
        rows.append(("held up", what))
    if dropped.get("groups"):
        what = f"{dropped['groups']:g} groups too old ({dropped['tokens']:g} tokens), their problems asked again"
        rows.append(("dropped", what))
    return rows


def length_bias(s: Mapping[str, Any]) -> str:
    """What dropping did to the data, in words."""
    dropped = s["dropped"]
    if not dropped.get("groups"):
        return ""
    if "len_bias" not in dropped:
        return f" {dropped['groups']:g} groups were dropped as too old; how long they were is not known."
    return (
        f" {dropped['groups']:g} groups were dropped as too old: {dropped['len_mean']:.0f} policy tokens a "
        f"trajectory, as far as generated, against {dropped['len_trained']:.0f} trained ({dropped['len_bias']:.2f} x)."
    )


def weights_checked(canary: Mapping[str, Any]) -> str:
    """How often generators were seen to hold what was published."""
    text = f"{canary['checked']} loads checked, log-probs differed by {canary['max_difference']:.1e} nats at most"
    if canary["unchecked"]:
        text += f"; NEVER CHECKED: {', '.join(canary['unchecked'])}"
    elif not canary["checked"]:
        text += "; NO GENERATOR WAS CHECKED"
    return text


def in_words(s: Mapping[str, Any]) -> str:
    """Whether it learned, how stale the data were, and what running side by side saved."""
    gain = s["reward_eval_last"] - s["reward_eval_first"]
    learned = "learned" if gain > CHANGE else "got worse" if gain < -CHANGE else "shows no clear change"
    serial = s["seconds_training"] + s["seconds_generating"]
    saved = f"generating and training in turn would have taken {serial:.0f} s, side by side {s['seconds']:.0f} s"
    if serial <= s["seconds"]:
        saved += ": nothing was saved"
    stale = (
        f"It trained on data {s['lag_mean']:.1f} steps old on average and never more than {s['lag_max']} "
        f"(allowed: {s['max_staleness']})."
    )
    return (
        f"The model {learned}: held-out reward {s['reward_eval_first']:.2f} -> {s['reward_eval_last']:.2f}. "
        f"{stale}{length_bias(s)} Time: {saved}."
    )
