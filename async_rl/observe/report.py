"""The report: one self-contained HTML page about one run or several.

`report_data` collects what the page shows as plain values, `page` puts them into the HTML; scripts and styles are in
`observe/page/`. Only files are read, so a run that goes on is not slowed. What is drawn is bounded whatever the length
of the run: curves and the timeline in buckets, histograms of at most `MOST_SCANNED` trajectories
(buffer/store_reader.py), the text of a few dozen groups.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from async_rl.buffer.failures import Failures, most_frequent
from async_rl.buffer.store_reader import StoreError, StoreSurvey, Surveyed
from async_rl.errors import UserError
from async_rl.events import EvaluationReported, RunResumed
from async_rl.observe import timeline
from async_rl.observe.charts import Curve, charts_for, curve
from async_rl.observe.conclusion import conclusion, summary_rows
from async_rl.observe.glossary import meaning
from async_rl.observe.record import RunRecord, incidents, read_run
from async_rl.observe.samples import samples
from async_rl.run_folder import replace_text
from async_rl.version import __version__

DIGITS = 5
"""significant digits of what is drawn"""
DETAIL_STEPS = 40
"""newest steps of which every span is drawn"""
DETAIL_TRAJECTORIES = 60_000
"""newest trajectories that are looked through for these spans"""
MOST_LANES = 24
"""generators that have a lane of their own; of more, those that worked least"""
NOT_GENERATORS = (timeline.TRAINER, timeline.HELD_OUT, "buffer", "weights", "tracker")
"""beginnings of the names of other lanes"""
MOST_EVENTS = 2_000
MOST_INCIDENTS = 50
MOST_FAILURES = 12
"""reasons of failed episodes that are listed"""
CLOCK_POINTS = 400
"""points of the curve that maps steps to time"""
STYLES = ("uplot.css", "report.css")
SCRIPTS = {
    "report": ("uplot.js", "charts.js", "timeline.js", "samples.js", "report.js"),
    "lab": ("uplot.js", "charts.js", "lab.js"),
}
"""by kind of page"""


def write_report(runs: Sequence[Path], out: Path, *, with_ratios: bool = True) -> None:
    """Write the page about these runs to `out`. `with_ratios`: compute importance ratios, which loads torch and a
    model.

    Raises UserError."""
    text = page(report_data([read_run(run) for run in runs], with_ratios=with_ratios))
    try:
        replace_text(out, text)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from None


def page(data: dict[str, Any], *, title: str = "", kind: str = "report") -> str:
    """The HTML page around collected values. Data are escaped, so none can end the element it stands in. `title`: the
    names of `data["runs"]` unless given; `kind`: one of SCRIPTS."""
    folder = files("async_rl.observe") / "page"
    css, js = ("\n".join((folder / name).read_text() for name in names) for names in (STYLES, SCRIPTS[kind]))
    # inside <script type="application/json"> only "<" matters, and JSON may write it so
    inlined = _json(data).replace("<", "\\u003c")
    inlined = inlined.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text
    title = html.escape(title or " · ".join(run["name"] for run in data["runs"]))
    parts = {"TITLE": title, "KIND": kind, "CSS": css, "JS": js, "DATA": inlined}
    pieces = (folder / "report.html").read_text().split("@@")  # text, name, text, name, ..., text
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _json(data: dict[str, Any]) -> str:
    """JSON in which numbers that JSON cannot hold, in a setting or a task's info, are text."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): clean(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [clean(inner) for inner in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    write = json.JSONEncoder(allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode
    try:
        return write(data)
    except ValueError:
        return write(clean(data))


def report_data(records: Sequence[RunRecord], *, with_ratios: bool = True) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    runs = [_run(record, with_ratios) for record in records]
    keys = list(dict.fromkeys(key for run in runs for key in run["curves"]))
    charts = charts_for(keys)
    return {
        "version": __version__,
        "made_at": time.time(),
        "runs": runs,
        "charts": [{"section": c.section, "title": c.title, "keys": c.keys, "log": c.log} for c in charts],
        "meanings": {key: meaning(key) for key in keys},
    }


def _run(record: RunRecord, with_ratios: bool) -> dict[str, Any]:
    state, words = record.state()
    start, end = timeline.bounds(record)
    notes = list(record.notes)
    run: dict[str, Any] = {
        "name": record.name,
        "path": str(record.folder.path),
        "state": state,
        "state_words": words,
        "facts": _facts(record),
        "words": _words(record),
        "start": start,
        "end": end,
        "clock": _clock(record, start),
        "curves": _curves(record),
        "rejects": _rejects(record),
        "events": _events(record),
        "incidents": [[i.step, i.name, i.text] for i in incidents(record.typed_events())][-MOST_INCIDENTS:],
        "settings": [[s.path, s.value, s.meaning, s.unit] for s in record.setting_rows],
        "survey": None,
        "refusals": [],
        "failures": [],
        "samples": [],
        "sample_notes": ["There is no store of trajectories here."],
        "timeline": _timeline(record, [], start, end),
        "notes": notes,
    }
    try:
        with StoreSurvey(record.folder.store) as store:
            run["survey"] = _survey(store.spread(), store.last_id())
            run["refusals"] = list(store.refusals().items())
            run["failures"] = list(_failures(store).items())
            run["samples"], run["sample_notes"] = samples(record, store, with_ratios=with_ratios)
            run["timeline"] = _timeline(record, store.newest(DETAIL_TRAJECTORIES), start, end)
    except (UserError, StoreError) as error:
        notes.append(str(error))
    return run


# ---------------------------------------------------------------- in words


def _facts(record: RunRecord) -> list[list[str]]:
    if record.summary is None:
        return []
    try:
        return [[name, value] for name, value in summary_rows(record.summary)]
    except (KeyError, TypeError, ValueError):  # of another version of this program
        return [[str(name), str(value)] for name, value in record.summary.items()]


def _words(record: RunRecord) -> str:
    if record.summary is not None:
        try:
            return conclusion(record.summary)
        except (KeyError, TypeError, ValueError):
            return ""
    if not record.rows:
        return "No step was trained yet."
    reward, lag = record.column("reward/mean"), record.column("lag/mean")
    tenth = max(1, len(reward) // 10)
    with np.errstate(all="ignore"):
        first, last = _mean(reward[:tenth]), _mean(reward[-tenth:])
    return (
        f"Mean reward went from {first:.2f} in the first {tenth} step{'s' * (tenth > 1)} to {last:.2f} in the last; "
        f"the data were {_mean(lag):.1f} steps old on average."
    )


def _mean(values: NDArray[np.float64]) -> float:
    good = values[np.isfinite(values)]
    return float(good.mean()) if len(good) else float("nan")


# ---------------------------------------------------------------- curves


def _curves(record: RunRecord) -> dict[str, Any]:
    steps = record.steps
    found: dict[str, Any] = {}
    everywhere = set[str]().union(*record.rows[:1]).intersection(*{tuple(row) for row in record.rows})
    for key in record.metric_keys():
        absent = np.zeros(len(record.rows), np.bool_)
        if key not in everywhere:
            absent[:] = [key not in row for row in record.rows]
        drawn = curve(steps, record.column(key), absent=absent)
        if drawn is not None:
            found[key] = _drawn(drawn)
    for key, value in _derived(record).items():
        drawn = curve(steps, value, absent=np.isnan(value))
        if drawn is not None:
            found[key] = _drawn(drawn)
    held_out = [e for e in record.typed_events() if isinstance(e, EvaluationReported)]
    if held_out:
        at = np.array([float(e.step) for e in held_out])
        order = np.argsort(at, kind="stable")
        reward = np.array([e.reward for e in held_out])
        drawn = curve(at[order], reward[order], absent=np.isnan(reward[order]))
        if drawn is not None:
            found["reward/eval"] = _drawn(drawn)
        for name in dict.fromkeys(name for e in held_out for name in e.parts):
            part = np.array([e.parts.get(name, np.nan) for e in held_out])[order]
            drawn = curve(at[order], part, absent=np.isnan(part))
            if drawn is not None:
                found[f"reward/{name}/eval"] = _drawn(drawn)
    return found


def _derived(record: RunRecord) -> dict[str, NDArray[np.float64]]:
    """The curves of glossary.DERIVED: rates, from the difference of one row to the one before. There is none across a
    resume."""
    times = record.column("time")
    if len(times) < 2:
        return {}
    seconds = np.append(np.nan, np.diff(times))
    resumed = [row.time for row in record.events if isinstance(row.event, RunResumed) and not math.isnan(row.time)]
    for at in resumed:
        seconds[np.searchsorted(times, at) : np.searchsorted(times, at) + 1] = np.nan
    seconds[seconds <= 0] = np.nan
    if record.share < 1:
        seconds[1:][np.diff(record.steps) != 1] = np.nan  # rows between the two were left out
    generated = np.append(np.nan, np.diff(record.column("tokens/generated")))
    busy = np.append(np.nan, np.diff(record.column("time/generator_busy")))
    generated[generated < 0] = np.nan  # counters that began anew
    busy[busy < 0] = np.nan
    count = np.maximum(record.column("generators"), 1.0)
    return {
        "tokens_per_s/trained": record.column("tokens/trained") / seconds,
        "tokens_per_s/generated": generated / seconds,
        "busy/generators": np.minimum(busy / seconds / count, 1.0),
    }


def _drawn(c: Curve) -> dict[str, Any]:
    plain = {"x": _numbers(c.step, whole=True), "y": _numbers(c.mean), "bad": c.not_finite}
    if c.low is not None and c.high is not None:
        plain |= {"lo": _numbers(c.low), "hi": _numbers(c.high)}
    return plain


def _numbers(values: Iterable[float], *, whole: bool = False) -> list[float | int | None]:
    """Numbers rounded to DIGITS, whole ones as integers, so that they are short in JSON."""
    if whole:
        return [int(v) for v in values]
    array = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.float64)
    size = np.abs(array)
    usual = (size > 1e-15) & (size < 1e20)  # powers of ten up to 10^22 are exact, so what is divided rounds once
    places = DIGITS - 1 - np.floor(np.log10(np.where(usual, size, 1.0)))
    digits, power = np.round(array * 10.0**places), 10.0 ** np.abs(places)
    rounded = np.where(usual, np.where(places >= 0, digits / power, digits * power), array).tolist()
    for i in np.flatnonzero(~usual & (array != 0)).tolist():
        rounded[i] = float(f"{rounded[i]:.{DIGITS}g}")
    return [int(v) if v.is_integer() and abs(v) < 1e15 else v for v in rounded]


def _clock(record: RunRecord, start: float) -> dict[str, Any]:
    """Seconds since the start of the run at some steps, to draw curves against time."""
    times, steps = record.column("time"), record.steps
    good = np.isfinite(times)
    times, steps = times[good] - start, steps[good]
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), CLOCK_POINTS)).astype(np.int64))
    if not len(steps):
        return {"x": [], "y": []}
    return {"x": _numbers(steps[chosen], whole=True), "y": [round(float(v), 2) for v in times[chosen]]}


# ---------------------------------------------------------------- histograms


def _survey(rows: Sequence[Surveyed], stored: int) -> dict[str, Any]:
    """Counts of trajectories by staleness, length, end and what became of them."""
    trained = [r for r in rows if r.step is not None and r.version_min >= 0]
    step = lambda r: r.step or 0  # noqa: E731
    lengths: dict[str, Counter[int]] = {}
    for row in rows:
        lengths.setdefault(_fate(row), Counter())[_bucket(row.policy_length)] += 1
    refused: dict[str, Counter[int]] = {}
    for row in rows:
        if row.refused_because:
            refused.setdefault(row.refused_because, Counter())[_bucket(row.policy_length)] += 1
    return {
        "read": len(rows),
        "stored": stored,
        "staleness": {
            "oldest token": _counted(step(r) - r.version_min for r in trained),
            "in the queue": _counted(step(r) - r.version_max for r in trained),
            "in flight": _counted(r.version_max - r.version_min for r in trained),
        },
        "lengths": {fate: sorted(counts.items()) for fate, counts in sorted(lengths.items())},
        "refused_lengths": {reason: sorted(counts.items()) for reason, counts in sorted(refused.items())},
        "ended": sorted(Counter(row.ended for row in rows).items()),
        "turns": _counted(row.num_turns for row in rows if row.split == "train"),
    }


def _fate(row: Surveyed) -> str:
    if row.ended in ("error", "aborted"):
        return "failed"
    if row.refused_because:
        return "refused"
    if row.split == "eval":
        return "held out"
    return "trained" if row.step is not None else "not used yet"


def _bucket(length: int) -> int:
    """Lower end of a length's histogram bucket: four a power of two, single lengths at the short end."""
    if length < 16:
        return length
    power = length.bit_length() - 3
    return (length >> power) << power


def _counted(values: Iterable[int]) -> list[list[int]]:
    return [[value, count] for value, count in sorted(Counter(values).items())]


def _failures(store: StoreSurvey) -> dict[str, int]:
    """Failed episodes by reason."""
    found = Failures()
    for reason, count in store.failures():
        found.add(reason, count)
    return most_frequent(found.counts.items(), MOST_FAILURES)


def _rejects(record: RunRecord) -> list[dict[str, Any]]:
    """What the objective rejected, reason by reason: tokens, trajectories, and trajectories by length."""
    found: dict[str, dict[str, Any]] = {}
    for key in record.metric_keys():
        parts = key.split("/")
        if len(parts) != 3 or parts[0] != "reject":
            continue
        total = float(np.nansum(record.column(key))) / record.share
        one = found.setdefault(parts[1], {"reason": parts[1], "tokens": 0, "trajectories": 0, "buckets": {}})
        if parts[2] in ("tokens", "trajectories"):
            one[parts[2]] = total
        elif total:
            one["buckets"][parts[2]] = total
    return [one for one in found.values() if one["tokens"] or one["trajectories"]]


# ---------------------------------------------------------------- timeline


def _timeline(record: RunRecord, newest: Sequence[Surveyed], start: float, end: float) -> dict[str, Any]:
    """Shares of time over the whole run, every span of the newest steps, and the events as marks."""
    if end <= start:
        return {"edges": [start, start], "lanes": [], "marks": [], "detail": None}
    edges = np.linspace(start, end, timeline.BUCKETS + 1)
    read = timeline.covered(record, edges)
    lanes = [{"name": timeline.TRAINER, "shares": _shares(timeline.trainer_spans(record), edges, read)}]
    busy = timeline.busy_share(record, edges)
    lanes.append({"name": "generators", "shares": {"generating": [round(float(v), 3) for v in busy]}})
    alive = timeline.lives(record)
    of_lane = by_lane(alive)
    shown, rest = divided(of_lane)
    for name in shown:
        shares = _shares(of_lane[name], edges)
        lanes.append({"name": f"{name} (process)" if name == timeline.TRAINER else name, "shares": shares})
    if rest:
        each = [_shares(of_lane[name], edges) for name in rest]
        doings = sorted({doing for one in each for doing in one})
        sums = {doing: np.sum([one[doing] for one in each if doing in one], axis=0) for doing in doings}
        mean = {doing: [round(float(v) / len(rest), 3) for v in found] for doing, found in sums.items()}
        lanes.append({"name": _and_more(rest), "shares": mean})
    told = [m for m in timeline.marks(record.events) if m.kind != "started" or len(record.events) < 200]
    return {
        "edges": [start, end],
        "lanes": lanes,
        "marks": [[round(m.at, 3), m.lane, m.kind, m.text, m.level] for m in told[-MOST_EVENTS:]],
        "detail": _detail(record, newest, alive),
    }


def _shares(
    spans: Sequence[timeline.Span], edges: NDArray[np.float64], read: NDArray[np.float64] | float = 1.0
) -> dict[str, list[float]]:
    """`read`: the share of each bucket of which metric rows were read."""
    found = timeline.shares(spans, edges)
    found |= {doing: np.minimum(found[doing] / read, 1.0) for doing in timeline.OF_ROWS if doing in found}
    return {doing: [round(float(v), 3) for v in share] for doing, share in found.items()}


def _detail(record: RunRecord, newest: Sequence[Surveyed], alive: Sequence[timeline.Span]) -> dict[str, Any] | None:
    if not record.rows:
        return None
    last = int(record.rows[-1]["step"])
    first = max(int(record.rows[0]["step"]), last - DETAIL_STEPS + 1)
    spans = timeline.trainer_spans(record, first)
    if not spans:
        return None
    low = min(span.start for span in spans if span.doing in ("waiting", "training"))
    high = max(span.end for span in spans)
    spans += [s for s in timeline.generator_spans(newest) if s.end > low and s.start < high]
    spans += [s for s in alive if s.doing == "starting" and s.end > low and s.lane != timeline.TRAINER]
    of_lane = by_lane(spans)
    shown, rest = divided(of_lane)
    drawn = {
        name: [
            [round(max(low, s.start) - low, 4), round(min(high, s.end) - low, 4), s.doing, s.text]
            for s in of_lane[name]
        ]
        for name in reversed(shown)
    }
    return {
        "first": first,
        "last": last,
        "start": low,
        "seconds": round(high - low, 4),
        "lanes": [
            *({"name": name, "spans": found} for name, found in drawn.items()),
            *([{"name": _and_more(rest), "spans": []}] if rest else []),
        ],
    }


def by_lane(spans: Sequence[timeline.Span]) -> dict[str, list[timeline.Span]]:
    """The spans of each lane."""
    found: dict[str, list[timeline.Span]] = {}
    for span in spans:
        found.setdefault(span.lane, []).append(span)
    return found


def divided(of_lane: Mapping[str, Sequence[timeline.Span]]) -> tuple[list[str], list[str]]:
    """Names of the lanes that are drawn, in order, and of the generators that are not, where there are many."""
    generators = [name for name in of_lane if not name.startswith(NOT_GENERATORS)]
    worked = {
        name: sum(span.end - span.start for span in of_lane[name] if span.doing != "waiting") for name in generators
    }
    rest = set(sorted(generators, key=lambda name: (worked[name], name))[MOST_LANES:])
    return sorted(set(of_lane) - rest), sorted(rest)


def _and_more(rest: Sequence[str]) -> str:
    return f"and {len(rest)} more"


def _events(record: RunRecord) -> list[list[Any]]:
    told = timeline.marks(record.events)
    loud = [mark for mark in told if mark.level != "plain"][-MOST_EVENTS:]
    quiet = [mark for mark in told if mark.level == "plain"][-MOST_EVENTS // 4 :]
    both = sorted([*loud, *quiet], key=lambda mark: mark.at)
    return [[round(m.at, 3), m.kind, m.lane, m.text[:2000], m.level] for m in both]
