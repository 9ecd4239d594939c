"""`async-rl top RUN`: how a run stands, in the terminal, drawn anew every second until it ends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from async_rl.buffer.store_reader import StoreError, StoreSurvey, Surveyed
from async_rl.errors import UserError
from async_rl.events import EvaluationReported, EventRow, read_event_rows
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.long_files import MOST_BYTES, read_spread
from async_rl.observe.record import RunRecord, State, active_alarms, incidents, read_json, read_run
from async_rl.observe.samples import tokenizer_of
from async_rl.observe.timeline import Mark, marks
from async_rl.process import Interrupted
from async_rl.run_folder import RowTail
from async_rl.trajectory.codec import WireError, unpack

EVERY_S = 1.0
MOST_ROWS = 40_000
"""rows of metrics kept in memory; beyond it every other of the older half is left out"""
WIDE = 118
"""a terminal with as many columns is divided into two halves"""
BLOCKS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉█"
MOST_GENERATORS = 12
"""in the table of processes"""
MOST_LAGS = 9
"""rows of a histogram; larger values are counted together"""
STYLES = {"bad": "red", "note": "yellow", "plain": "dim"}
NEWEST = 2_000
"""newest trajectories, of which the staleness histograms are made"""
SAMPLES = 6
"""trajectories of which the text is shown, each of another group"""
FAILURES_OF = 20
"""newest steps whose failed episodes are reported"""
SAMPLE_TOKENS = 200
"""last tokens of a trajectory that are decoded"""


def top(run: Path, *, once: bool, console: Console | None = None) -> None:
    """Show the run until it ends. It is shown only once with `once`, when it has ended, and when the output is no
    terminal.

    Raises UserError when `run` is no run folder."""
    console = console or Console(highlight=False)
    poller = RunPoller(run)
    view = poller.poll()
    if once or view.state != "going on" or not console.is_terminal:
        console.print(render(view, console.width, time.time()))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            while view.state == "going on":
                live.update(render(view, console.width, time.time()), refresh=True)
                time.sleep(EVERY_S)
                view = poller.poll()
    except Interrupted:
        pass  # how one leaves; the run goes on
    console.print(render(view, console.width, time.time()))


def render(view: RunView, width: int, now: float) -> RenderableType:
    """The whole picture for a terminal of `width` columns. `now`: seconds since the epoch."""
    half = (width - 1) // 2 if width >= WIDE else width
    learning = _panel("learning", _learning(view, half - 4))
    stale = _panel("staleness of the newest trajectories", _staleness(view, half - 4))
    processes = _panel("processes", _processes(view, half - 4))
    waits = _panel("who waits for whom", _waits(view, half - 4))
    samples = _panel("newest trajectories", _samples(view, width - 4))
    parts: list[RenderableType] = [_head(view, width, now)]
    if width >= WIDE:
        grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(Group(learning, stale), Group(processes, waits))
        parts.append(grid)
    else:
        parts += [learning, waits, processes, stale]
    if view.marks:
        parts.append(_panel("worth a look", _marks(view, now)))
    return Group(*parts, samples)


def _panel(title: str, inside: RenderableType) -> Panel:
    return Panel(inside, title=Text(title, style="bold"), title_align="left", box=box.ROUNDED, border_style="dim")


# ---------------------------------------------------------------- what is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class NewestTrajectory:
    """The text of a trajectory and what became of it."""

    step: int | None
    reward: float | None
    version_min: int
    version_max: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """What `top` shows of a run at one moment."""

    record: RunRecord
    state: State
    words: str
    """how the run stands"""
    live: Mapping[str, Any]
    """live.json; empty when there is none"""
    in_flight: Mapping[int, int]
    """staleness that arose while a trajectory was generated, in steps -> how many of the newest trained trajectories"""
    in_queue: Mapping[int, int]
    """staleness that arose after a trajectory's last token, in steps -> how many of them"""
    samples: tuple[NewestTrajectory, ...]
    """newest first"""
    store_note: str
    """why the store cannot be read; empty when it can"""
    marks: tuple[Mark, ...]
    """events that tell of trouble or are worth a look, newest last"""


@dataclass(slots=True)
class RunPoller:
    """Reads a run folder again and again; each time only what is new."""

    path: Path
    _record: RunRecord | None = None
    _metrics: RowTail = field(init=False)
    _events: RowTail = field(init=False)
    _rows: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _event_rows: list[EventRow] = field(default_factory=list)
    _tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        self._metrics = RowTail(self.path / "metrics.jsonl")
        self._events = RowTail(self.path / "events.jsonl")

    def poll(self) -> RunView:
        """How the run stands now. Raises UserError when the folder holds no run."""
        if self._record is None:
            self._record = read_run(self.path)
            self._tokenizer = tokenizer_of(self._record)
            self._rows = {int(row["step"]): row for row in self._record.rows}
            self._metrics.skip(to=self._record.read_to)
        self._follow()
        folder = self._record.folder
        record = replace(
            self._record,
            rows=tuple(self._rows[step] for step in sorted(self._rows)),
            events=tuple(self._event_rows),
            summary=read_json(folder.summary, []),
        )
        newest, samples, note = self._stored(record)
        trained = [row for row in newest if row.step is not None and row.version_min >= 0]
        state, words = record.state()
        return RunView(
            record=record,
            state=state,
            words=words,
            live=read_json(folder.path / "live.json", []) or {},
            in_flight=Counter(row.version_max - row.version_min for row in trained),
            in_queue=Counter((row.step or 0) - row.version_max for row in trained),
            samples=tuple(samples),
            store_note=note,
            marks=tuple(mark for mark in marks(self._event_rows[-5000:]) if mark.level != "plain"),
        )

    def _follow(self) -> None:
        if self._metrics.unread() > MOST_BYTES:  # as when a long run was resumed, which replaces the file
            found = read_spread(self._metrics.path)
            rows, again = found.rows, True
            self._metrics.skip(to=found.end)
        else:
            rows, again = self._metrics.poll()
        if again:
            self._rows.clear()
        self._rows |= {int(row["step"]): row for row in rows if isinstance(row.get("step"), int | float)}
        while len(self._rows) > MOST_ROWS:
            kept = sorted(self._rows)
            kept = [*kept[: -MOST_ROWS // 2 : 2], *kept[-MOST_ROWS // 2 :]]
            self._rows = {step: self._rows[step] for step in kept}
        told, again = self._events.poll()
        if again:
            self._event_rows.clear()
        self._event_rows += read_event_rows(told)

    def _stored(self, record: RunRecord) -> tuple[list[Surveyed], list[NewestTrajectory], str]:
        if not record.folder.store.is_file():
            return [], [], ""
        try:
            with StoreSurvey(record.folder.store) as store:
                newest = store.newest(NEWEST)
                return newest, self._samples(store, newest), ""
        except (UserError, StoreError) as error:
            return [], [], str(error)

    def _samples(self, store: StoreSurvey, newest: list[Surveyed]) -> list[NewestTrajectory]:
        """One trajectory of each of the newest groups."""
        chosen: dict[int, Surveyed] = {}
        for row in reversed(newest):
            if row.split == "train" and row.group not in chosen and len(chosen) < SAMPLES:
                chosen[row.group] = row
        found = []
        for group, row in chosen.items():
            for blob in store.load_groups([group]):
                try:
                    trajectory = unpack(blob)
                except WireError:
                    continue
                if trajectory.sample == row.sample:
                    last = trajectory.tokens[(0, *trajectory.contexts)[-1] :]
                    found.append(_sample(row, last[-SAMPLE_TOKENS:].tolist(), self._tokenizer))
        return found


def _sample(row: Surveyed, tokens: list[int], tokenizer: Tokenizer | None) -> NewestTrajectory:
    text = tokenizer.decode(tokens) if tokenizer is not None else " ".join(map(str, tokens))
    return NewestTrajectory(
        step=row.step, reward=row.reward, version_min=row.version_min, version_max=row.version_max, text=text
    )


# ---------------------------------------------------------------- the parts of the picture


def _head(view: RunView, width: int, now: float) -> RenderableType:
    record = view.record
    colour = {"finished": "green", "going on": "cyan", "stopped": "yellow"}.get(view.state, "red")
    title = Text.assemble((record.name, "bold"), "  ", (view.words, colour))
    done = int(record.rows[-1]["step"]) + 1 if record.rows else 0
    wanted = record.settings.trainer.steps if record.settings is not None else 0
    if view.state == "going on":  # a resumed run may have been given more
        wanted = int(view.live.get("steps", wanted))
    lines = [title, *_alarms(view)]
    if wanted:
        left = _time_left(view, done, wanted)
        size = max(8, min(60, width - 34))
        lines.append(Text.assemble((_bar(done / wanted, size), colour), f" {done / wanted:4.0%}  {left}"))
    told = view.live.get("time")
    if view.state == "going on" and isinstance(told, int | float) and now - told > 10:
        lines.append(Text(f"the launcher has not written live.json for {now - told:.0f} s", style="red"))
    return Group(*lines)


def _alarms(view: RunView) -> list[Text]:
    found = [Text(f"ALARM at step {a.step}, {a.name.removeprefix('alarm ')}: {a.text}", style="bold red")
             for a in active_alarms(view.record.typed_events())]  # fmt: skip
    back = [i for i in incidents(view.record.typed_events()) if i.name.startswith("rollback")]
    return [*found, *(Text(f"it went back {i.text}", style="yellow") for i in back)]


def _time_left(view: RunView, done: int, wanted: int) -> str:
    times = view.record.column("time")[-50:]
    if view.state != "going on" or done >= wanted or len(times) < 3:
        return ""
    return f"{duration((wanted - done) * float(times[-1] - times[0]) / (len(times) - 1))} to go"


def _learning(view: RunView, width: int) -> RenderableType:
    record = view.record
    held_out = [e.reward for e in record.typed_events() if isinstance(e, EvaluationReported)]
    table = Table.grid(padding=(0, 1))
    table.add_column(width=12, style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    size = max(5, width - 12 - 9 - 3)
    rows = (
        ("reward", record.column("reward/mean"), "green"),
        ("held-out", np.array(held_out), "green"),
        ("ESS", record.column("ess/ratio"), "cyan"),
        ("staleness", record.column("lag/mean"), "magenta"),
        ("gradient", record.column("grad/norm"), "yellow"),
        ("entropy", record.column("entropy"), "blue"),
        ("tokens/s", _rate(view), "white"),
        *([("failed", failed, "red")] if np.nansum(failed := record.column("episodes/failed")) > 0 else []),
    )
    for name, values, colour in rows:
        good = values[np.isfinite(values)]
        if len(good):
            table.add_row(name, Text(sparkline(good, size), style=colour), short(float(values[-1])))
    if not record.rows:
        return Text("no step was trained yet", style="dim")
    return Group(table, _factors(record.rows[-1]), _slots(view, width), *_failure(record))


def _failure(record: RunRecord) -> list[Text]:
    """Why the newest failed episode failed, where the newest steps had any."""
    told = [str(row["episodes/failure"]) for row in record.rows[-FAILURES_OF:] if row.get("episodes/failure")]
    return [Text(f"an episode failed: {told[-1]}", style="red")] if told else []


def _rate(view: RunView) -> NDArray[np.float64]:
    seconds = np.diff(view.record.column("time"))
    tokens = view.record.column("tokens/trained")[1:]
    return np.divide(tokens, seconds, out=np.full(len(seconds), np.nan), where=seconds > 0)


def _factors(row: Mapping[str, float]) -> Text:
    """The learning rate of the last step and what it is made of."""
    if "lr/base" not in row:
        return Text("")
    made = f"{row['lr/base']:.3g} x ESS {row.get('lr/ess_scale', 1):.3f} x κ {row.get('lr/kappa', 1):.3f}"
    if "lr/rollback" in row:
        made += f" x rollback {row['lr/rollback']:.3g}"
    return Text.assemble(
        ("learning     ", "dim"), f"{row.get('lr/effective', row['lr/base']):.3g}", (f" = {made}", "dim")
    )


def _slots(view: RunView, width: int) -> Text:
    row = view.record.rows[-1]
    slots = view.live.get("slots") if view.state == "going on" else None
    used, most = row.get("slots/used", 0), row.get("slots/all", 0)
    if isinstance(slots, Mapping) and slots.get("all"):
        used, most = slots["used"], slots["all"]
    size = max(5, min(30, width - 32))
    return Text.assemble(("slots        ", "dim"), (_bar(used / max(1, most), size), "cyan"), f" {used:g} of {most:g}")


def _staleness(view: RunView, width: int) -> RenderableType:
    if not view.in_flight:
        return Text(view.store_note or "no trajectory was trained yet", style="dim")
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    size = max(4, (width - 5 - 14) // 2)
    table.add_row("steps", Text("in flight", style="magenta"), Text("in the queue", style="cyan"))
    lags = sorted({*view.in_flight, *view.in_queue})
    for lag in lags[:MOST_LAGS]:
        more = lag == lags[:MOST_LAGS][-1] and len(lags) > MOST_LAGS
        cells = []
        for counts, colour in ((view.in_flight, "magenta"), (view.in_queue, "cyan")):
            count = sum(n for at, n in counts.items() if at == lag or (more and at > lag))
            share = count / max(1, sum(counts.values()))
            cells.append(Text.assemble((_bar(share, size), colour), f"{share:4.0%}"))
        table.add_row(f"{lag}{'+' if more else ''}", *cells)
    return table


def _processes(view: RunView, width: int) -> RenderableType:
    rows = view.live.get("processes")
    if view.state != "going on" or not isinstance(rows, list) or not rows:
        return Text("none" if view.state != "going on" else "nothing is known of them", style="dim")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", expand=True)
    table.add_column("process", no_wrap=True, overflow="ellipsis", min_width=9)
    table.add_column("version", justify="right", no_wrap=True)
    table.add_column("doing", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("for", justify="right", no_wrap=True)
    roomy = width >= 56
    if roomy:
        table.add_column("heard", justify="right", no_wrap=True)
    shown, more = _chosen(rows)
    for row in shown:
        version = row.get("version", view.live.get("published") if row.get("role") == "trainer" else None)
        silent = _seconds(row.get("silent_s"))
        style = "red" if silent > 10 else "yellow" if silent > 5 else ""
        cells: list[RenderableType] = [
            Text(str(row.get("name", "?"))),
            "" if version is None else str(version),
            Text(str(row.get("doing", ""))),
            duration(_seconds(row.get("since_s"))),
        ]
        table.add_row(*cells, *([Text(f"{duration(silent)} ago", style=style)] if roomy else []))
    return Group(table, Text(more, style="dim")) if more else table


def _chosen(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """Rows of processes that are shown, and the others in words. Of many generators those that are silent longest."""
    generators = [row for row in rows if row.get("role") == "generator"]
    if len(generators) <= MOST_GENERATORS:
        return list(rows), ""
    by_silence = sorted(generators, key=lambda row: -_seconds(row.get("silent_s")))
    shown, rest = by_silence[:MOST_GENERATORS], by_silence[MOST_GENERATORS:]
    versions = sorted({int(row["version"]) for row in rest if "version" in row})
    newest = f" to {versions[-1]}" if len(versions) > 1 else ""
    hold = f", with version {versions[0]}{newest}" if versions else ""
    heard = duration(_seconds(rest[0].get("silent_s")))
    others = [row for row in rows if row.get("role") != "generator"]
    return [*others, *shown], f"and {len(rest)} more generators{hold}, all heard within {heard}"


def _waits(view: RunView, width: int) -> RenderableType:
    waits = view.live.get("waits")
    if view.state != "going on":
        return Text("nobody", style="dim")
    if not isinstance(waits, list) or not waits:
        return Text("nobody, for more than a second", style="dim")
    parts = []
    for wait in waits[:6]:
        seconds = _seconds(wait.get("seconds"))
        style = "bold red" if seconds > 30 else "bold yellow" if seconds > 5 else "bold"
        first = Text.assemble((str(wait.get("who")), style), f" for {wait.get('what')}, {duration(seconds)}")
        parts += [first, Text(f"  {wait.get('why')}", style="dim")]
    return Group(*parts)


def _samples(view: RunView, width: int) -> RenderableType:
    if not view.samples:
        return Text(view.store_note or "none", style="dim")
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for sample in view.samples:
        step = "waiting" if sample.step is None else f"step {sample.step}"
        reward = "no reward" if sample.reward is None else f"{sample.reward:.3g}"
        colour = "green" if (sample.reward or 0) > 0 else "red" if (sample.reward or 0) < 0 else ""
        versions = "-".join(str(v) for v in sorted({sample.version_min, sample.version_max}))
        text = " ".join(sample.text.split())
        table.add_row(step, Text(reward, style=colour), f"v{versions}", Text(_end_of(text, max(10, width - 34))))
    return table


def _marks(view: RunView, now: float) -> RenderableType:
    return Group(
        *(
            Text.assemble(
                (f"{duration(max(0.0, now - mark.at))} ago  ", "dim"),
                (f"{mark.kind.replace('_', ' ')} {mark.lane}", STYLES[mark.level]),
                f"  {' '.join(mark.text.split())[:300]}",
            )
            for mark in view.marks[-4:]
        )
    )


# ---------------------------------------------------------------- numbers and bars as text


def sparkline(values: Sequence[float] | NDArray[np.float64], width: int) -> str:
    """Means of up to `width` buckets as blocks, from the lowest to the highest of them."""
    array = np.asarray(values, np.float64)
    array = np.clip(array[np.isfinite(array)], -1e150, 1e150)  # so that no sum overflows
    if not len(array):
        return ""
    means = np.array([part.mean() for part in np.array_split(array, min(width, len(array)))])
    low, high = means.min(), means.max()
    level = np.zeros(len(means)) if high <= low else (means - low) / (high - low)
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(x * len(BLOCKS)))] for x in level)


def _bar(share: float, width: int) -> str:
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (EIGHTHS[rest] if rest else "")).ljust(width, "·" if width >= 20 else " ")


def short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _end_of(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[-width + 1 :]


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
