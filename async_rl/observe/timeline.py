"""What each process of a run did, as spans of time made from metric rows, events and stored episodes.

A metric row says how long the trainer waited for its batch, trained and published; the spans of a step are laid out
backwards from the time of its row. What a generator did is known from its episodes. A process lives from its event
`started` to its death, to the next start of the same name, or to the last row or event of the run.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from async_rl.buffer.store_reader import Surveyed
from async_rl.events import CheckpointSaved, EvaluationReported, EventRow
from async_rl.observe.record import RunRecord

TRAINER = "trainer"
HELD_OUT = "held-out episodes"
"""the lane of evaluation episodes, whichever generator ran them"""
OF_ROWS = {"publishing": "time/publish", "training": "time/step", "waiting": "time/wait_for_batch"}
"""what a metric row tells the seconds of, from its end backwards"""
BUCKETS = 600
"""time buckets of the overview of a whole run"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of time that one process spent on one thing.

    Example: `Span(lane="trainer", doing="training", start=12.0, end=13.5, text="step 3")`.
    """

    lane: str
    """name of the process"""
    doing: str
    """starting, waiting, training, publishing, evaluating, checkpoint, generating or alive"""
    start: float
    """seconds since the epoch"""
    end: float
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An event as it is drawn: a moment on the lane of a process."""

    lane: str
    """name of the process that the event is about; empty: the whole run"""
    kind: str
    at: float
    text: str
    level: str
    """ "bad", "note" or "plain" """


BAD = ("failed", "died", "stall", "frozen", "alarm", "collapse", "damaged", "wrong", "refused", "force", "lost")
"""words in the names of events that tell of trouble"""
NOTE = ("resumed", "rejoined", "left", "interrupted", "silent", "skipped", "rollback", "turned_away", "still_running")
"""words in the names of events that are worth a look"""
OF_TRAINER = ("checkpoint", "evaluation", "step_skipped", "alarm", "rollback")
"""events of the trainer, whose rows name no process"""


def level_of(kind: str) -> str:
    """ "bad", "note" or "plain", by the name of an event."""
    if any(word in kind for word in BAD):
        return "bad"
    return "note" if any(word in kind for word in NOTE) else "plain"


def marks(events: Iterable[EventRow]) -> list[Mark]:
    """Every event with a time as a mark, in the order of time."""
    found = []
    for event in events:
        kind, row = event.name, event.row
        if math.isnan(event.time):
            continue
        named = row.get("process") or row.get("name")
        lane = str(named) if named else TRAINER if kind in OF_TRAINER else ""
        detail = {k: v for k, v in row.items() if k not in ("event", "time", "process", "name")}
        text = ", ".join(f"{k} {_shown(v)}" for k, v in detail.items())
        found.append(Mark(lane=lane, kind=kind, at=event.time, text=text, level=level_of(kind)))
    return sorted(found, key=lambda mark: mark.at)


def bounds(record: RunRecord) -> tuple[float, float]:
    """Times of the first and the last row or event; (0, 0) when there is none."""
    seen = _times(record)
    return (seen[0], seen[-1]) if seen else (0.0, 0.0)


def _times(record: RunRecord) -> list[float]:
    """Times of all metric rows and events, sorted."""
    steps = [float(row["time"]) for row in record.rows if isinstance(row.get("time"), int | float)]
    return sorted([*steps, *(event.time for event in record.events if not math.isnan(event.time))])


def lives(record: RunRecord) -> list[Span]:
    """When each process started up, and when it was alive."""
    signs = _times(record)
    last = signs[-1] if signs else 0.0
    open_: dict[str, tuple[float, float | None]] = {}
    found: list[Span] = []

    def close(name: str, at: float) -> None:
        if name in open_:
            started, ready = open_.pop(name)
            found.append(Span(lane=name, doing="starting", start=started, end=ready or at))
            if ready is not None:
                found.append(Span(lane=name, doing="alive", start=ready, end=max(ready, at)))

    for mark in marks(record.events):
        kind, name = mark.kind, mark.lane
        if kind in ("resumed", "interrupted"):  # of an earlier launch nothing lives any more
            before = signs[max(0, bisect_left(signs, mark.at) - 1)]  # a launch that was killed leaves no last word
            for other in list(open_):
                close(other, mark.at if kind == "interrupted" else max(before, open_[other][0]))
        elif kind == "started":
            close(name, mark.at)
            open_[name] = (mark.at, None)
        elif kind.endswith("_ready"):
            who = name or kind.removesuffix("_ready")
            if who in open_:
                open_[who] = (open_[who][0], mark.at)
        elif kind in ("generator_died", "failed"):
            close(name, mark.at)
    for name in list(open_):
        close(name, last)
    return [span for span in found if span.end > span.start]


def trainer_spans(record: RunRecord, first: int = 0, last: int | None = None) -> list[Span]:
    """What the trainer did in the steps `first` to `last`, with checkpoints and the evaluations that it waited for."""
    found: list[Span] = []
    rows = [r for r in record.rows if "time" in r and first <= r["step"] and (last is None or r["step"] <= last)]
    for row in rows:
        end, step = float(row["time"]), int(row["step"])
        for doing, key in OF_ROWS.items():
            start = end - max(0.0, float(row.get(key, 0.0)))
            if end > start:
                found.append(Span(lane=TRAINER, doing=doing, start=start, end=end, text=f"step {step}"))
            end = start
    low = min((s.start for s in found[:3]), default=0.0) if first else 0.0
    high = rows[-1]["time"] if rows and last is not None else float("inf")
    found += [s for s in _beside_steps(record) if low <= s.end and s.start <= high]
    return sorted(found, key=lambda span: span.start)


def _beside_steps(record: RunRecord) -> list[Span]:
    """Checkpoints, and evaluations during which no version was published: the trainer waited for those."""
    times = np.sort(record.column("time"))
    ready = [m.at for m in marks(record.events) if m.kind == "trainer_ready"]
    found = []
    for row in record.events:
        at = row.time
        if math.isnan(at):
            continue
        match row.event:
            case CheckpointSaved(seconds=seconds, beside=beside, version=version):
                text, end = f"version {version}", at - beside
                found.append(Span(lane=TRAINER, doing="checkpoint", start=end - seconds, end=end, text=text))
            case EvaluationReported(version_min=oldest, version_max=newest, reward=reward) if oldest == newest:
                # weights stood still: the trainer waited for it, from its last row or its start
                before = [*times[times <= at][-1:], *[r for r in ready if r <= at][-1:]]
                if before:
                    text = f"held-out reward {reward}"
                    found.append(Span(lane=TRAINER, doing="evaluating", start=float(max(before)), end=at, text=text))
    return found


def generator_spans(rows: Sequence[Surveyed]) -> list[Span]:
    """When each generator ran at least one training episode, and when it waited between two. Evaluation episodes of all
    generators share one lane."""
    by_name: dict[str, list[Surveyed]] = defaultdict(list)
    for row in rows:
        if row.started_at > 0 and row.finished_at >= row.started_at:
            by_name[row.generator if row.split == "train" else HELD_OUT].append(row)
    found = []
    for name, episodes in sorted(by_name.items()):
        episodes.sort(key=lambda row: row.started_at)
        doing = "evaluating" if name == HELD_OUT else "generating"
        start, end, count = episodes[0].started_at, episodes[0].finished_at, 0
        for row in episodes:
            if row.started_at > end:
                found.append(Span(lane=name, doing=doing, start=start, end=end, text=_episodes(count)))
                if name != HELD_OUT:
                    found.append(Span(lane=name, doing="waiting", start=end, end=row.started_at))
                start, count = row.started_at, 0
            end, count = max(end, row.finished_at), count + 1
        found.append(Span(lane=name, doing=doing, start=start, end=end, text=_episodes(count)))
    return found


def _episodes(count: int) -> str:
    return f"{count} episode{'s' * (count != 1)}"


def shares(spans: Sequence[Span], edges: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Thing done -> share of each bucket [edges[i], edges[i + 1]) that was spent on it. The spans of one thing must be
    disjoint."""
    found = {}
    width = np.maximum(np.diff(edges), 1e-9)
    for doing in dict.fromkeys(span.doing for span in spans):
        chosen = np.array([(s.start, s.end) for s in spans if s.doing == doing])
        chosen = chosen[np.argsort(chosen[:, 0])]
        starts, ends = chosen[:, 0], np.maximum.accumulate(chosen[:, 1])
        starts = np.maximum(starts, np.append(-np.inf, ends[:-1]))  # rounding: the next begins where one ends
        lengths = np.maximum(ends - starts, 0.0)
        total = np.append(0.0, np.cumsum(lengths))
        before = np.searchsorted(starts, edges, side="right")  # begun by then
        running = np.maximum(0.0, ends[np.maximum(before - 1, 0)] - edges) * (before > 0)
        spent = total[before] - np.minimum(running, lengths[np.maximum(before - 1, 0)] * (before > 0))
        found[doing] = np.clip(np.diff(spent) / width, 0.0, 1.0)
    return found


def covered(record: RunRecord, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of each bucket of which metric rows were read: less than 1 for a long run, of which some were left
    out."""
    if record.share >= 1:
        return np.ones(len(edges) - 1)
    times, steps = record.column("time"), record.steps
    pairs = zip(times[:-1].tolist(), times[1:].tolist(), np.diff(steps).tolist(), strict=True)
    spans = [Span(lane=TRAINER, doing="read", start=a, end=b) for a, b, more in pairs if more == 1 and b > a]
    found = shares(spans, edges).get("read", np.zeros(len(edges) - 1))
    return np.where(found > 0, found, 1.0)


def busy_share(record: RunRecord, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of each bucket in which a generator decoded, on average over the generators."""
    times, busy = record.column("time"), record.column("time/generator_busy")
    count = np.maximum(1.0, np.nan_to_num(record.column("generators"), nan=1.0))
    good = np.isfinite(times) & np.isfinite(busy)
    if good.sum() < 2:
        return np.zeros(len(edges) - 1)
    times, each = times[good], np.maximum(0.0, np.diff(busy[good], prepend=busy[good][0])) / count[good]
    total = np.interp(edges, times, np.cumsum(each))
    return np.clip(np.diff(total) / np.maximum(np.diff(edges), 1e-9), 0.0, 1.0)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
