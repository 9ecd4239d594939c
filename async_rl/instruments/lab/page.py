"""lab.html: the plots and tables of a lab in one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10
from pathlib import Path
from statistics import fmean

from async_rl.instruments.lab.merit import COLLAPSED, HOLDS, CellRecord, Curves, Merit, Rate, read_curves
from async_rl.instruments.lab.plan import Plan

# -------------------- table
# What a lab came to, in the terminal.

HEAD = (
    "recipe", "lag", "best reward", "of synchronous", "of its own", "at rate", "effective", "span of rates",
    "as synchronous", "collapsed",
)  # fmt: skip


def merit_lines(merits: Iterable[Merit]) -> list[str]:
    """One table a task: every recipe and lag with both figures of merit."""
    by_task: dict[str, list[Merit]] = {}
    for merit in merits:
        by_task.setdefault(merit.task, []).append(merit)
    lines: list[str] = []
    for task, found in by_task.items():
        rows = [HEAD, *(merit_row(m) for m in sorted(found, key=lambda m: (m.lag, -m.best_reward)))]
        lines += ["", f"task {task}", *columns(rows)]
    return lines


def merit_row(m: Merit) -> tuple[str, ...]:
    replicates = sum(rate.replicates for rate in m.rates)
    collapsed = sum(rate.collapsed for rate in m.rates)
    spread = f" ± {m.best_spread:.2f}" if any(rate.replicates > 1 for rate in m.rates) else ""
    return (
        m.recipe,
        str(m.lag),
        f"{m.best_reward:.3f}{spread}",
        f"{m.share_of_synchronous:.2f}",
        "" if m.share_of_own is None else f"{m.share_of_own:.2f}",
        f"{m.best_learning_rate:g}",
        f"{m.best_rate.effective:.2g}",
        span_text(m),
        _KEPT[m.keeps_reward, m.keeps_span],
        f"{collapsed} of {replicates}",
    )


_KEPT = {
    (True, True): "both",
    (True, False): "reward",
    (False, True): "span",
    (False, False): "",
}
"""which figures are at least those of the best synchronous training"""


def rate_lines(merits: Iterable[Merit]) -> list[str]:
    """One table a task: the mean final reward at every learning rate, what was really taken, who holds."""
    by_task: dict[str, list[Merit]] = {}
    for merit in merits:
        by_task.setdefault(merit.task, []).append(merit)
    lines: list[str] = []
    for task, found in by_task.items():
        rates = sorted({rate.learning_rate for m in found for rate in m.rates})
        rows = [("recipe", "lag", *(f"at {rate:g}" for rate in rates))]
        for m in sorted(found, key=lambda m: (m.lag, -m.best_reward)):
            of = {rate.learning_rate: rate for rate in m.rates}
            rows.append((m.recipe, str(m.lag), *(rate_text(of.get(rate)) for rate in rates)))
        lines += ["", f"task {task}: final reward by learning rate (factor of the rate; * holds)", *columns(rows)]
    return lines


def rate_text(rate: Rate | None) -> str:
    """`0.612 (0.55) *`: mean final reward, mean factor of the learning rate, whether it holds."""
    if rate is None:
        return ""
    factor = f" ({rate.factor:.2f})" if rate.factor < 0.995 else ""
    return f"{rate.reward:.3f}{factor}{' *' if rate.holds else '  '}"


def span_text(m: Merit) -> str:
    """`x 4.0`; `> x 4.0` where an end of the grid still holds; `none`."""
    if m.span == 0:
        return "none"
    return f"{'>= ' if m.open_below or m.open_above else ''}x {m.span_interpolated:.1f}"


def cell_line(record: CellRecord) -> str:
    """One finished cell."""
    if record.failed:
        return f"{record.name}: FAILED, {record.failed}"
    assert record.reward_final is not None
    assert record.seconds is not None
    ess = f", ESS {record.ess_min:.2f} at least" if record.ess_min is not None else ""
    return (
        f"{record.name}: reward {record.reward_first:.2f} -> {record.reward_final:.2f} (best {record.reward_best:.2f})"
        f"{', COLLAPSED' if record.collapsed else ''}{ess}, {record.seconds:.0f} s"
    )


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text; the first column to the left, the others to the right."""
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])]) for row in rows]


# -------------------- chart
# Lines on axes as SVG text: enough for a lab's page, which then needs no script and no network.

COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b",
    "#e377c2", "#17becf", "#7f7f7f", "#bcbd22", "#003f5c", "#a05195",
)  # fmt: skip
WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 24, 30
MOST_POINTS = 160
"""points of a line; more are averaged"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()
    """half the height of a bar at each point"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    title: str
    x_label: str
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = True
    """the y axis begins at 0 (not with log_y)"""


def chart(axes: Axes, lines: Sequence[Line]) -> str:
    """One SVG figure. Points that are not finite (or not above 0 on a logarithmic axis) are left out."""
    drawn = [(line, _visible(axes, line)) for line in lines]
    xs = [x for _, points in drawn for x, _, _ in points]
    ys = [y + sign * s for _, points in drawn for _, y, s in points for sign in (-1, 1)]
    if not xs:
        return ""
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = _widened(min(ys), max(ys))
    if axes.from_zero and not axes.log_y:
        y_low = min(0.0, y_low)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(axes.title)}">',
        f'<text x="{LEFT}" y="14" class="title">{escape(axes.title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(axes.x_label)}</text>',
    ]
    for value, text in ticks(x_low, x_high, log=axes.log_x):
        x, y = at(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{y + 13:.1f}" text-anchor="middle">{text}</text>')
    for value, text in ticks(y_low, y_high, log=axes.log_y):
        x, y = at(x_low, value)
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{x - 4:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for line, points in drawn:
        parts += _line(line, [(*at(x, y), at(x, y - s)[1], at(x, y + s)[1]) for x, y, s in points])
    return "\n".join([*parts, "</svg>"])


def _line(line: Line, places: Sequence[tuple[float, float, float, float]]) -> list[str]:
    """places: x, y, lower and upper end of the bar, in pixels."""
    if not places:
        return []
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in places)
    parts = [f'<path class="line" stroke="{line.colour}" d="M{path}"><title>{escape(line.label)}</title></path>']
    if len(places) <= 12:
        parts += [f'<circle fill="{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y, _, _ in places]
    bars = [(x, low, high) for x, _, low, high in places if low != high]
    parts += [f'<path class="bar" stroke="{line.colour}" d="M{x:.1f} {a:.1f}V{b:.1f}"/>' for x, a, b in bars]
    return parts


def _visible(axes: Axes, line: Line) -> list[tuple[float, float, float]]:
    """(x, y, half height of the bar), on the axes' scales."""
    spread = line.spread or [0.0] * len(line.points)
    found = [
        (x, y, s)
        for (x, y), s in zip(line.points, spread, strict=True)
        if isfinite(y) and not (axes.log_x and x <= 0) and not (axes.log_y and y <= 0)
    ]
    found = _thinned(found)
    if axes.log_x:
        found = [(log10(x), y, s) for x, y, s in found]
    if axes.log_y:
        found = [(x, log10(y), 0.0) for x, y, _ in found]
    return found


def _thinned(points: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Means of neighbours, when there are more points than can be seen."""
    step = ceil(len(points) / MOST_POINTS)
    if step <= 1:
        return points
    groups = [points[i : i + step] for i in range(0, len(points), step)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g), max(p[2] for p in g)) for g in groups]


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low: float, high: float, *, log: bool) -> list[tuple[float, str]]:
    """(position on the axis, text) of about five round values within low .. high."""
    if log:
        exponents = range(floor(low), ceil(high) + 1)
        found = [(log10(m) + e, f"{m * 10.0**e:g}") for e in exponents for m in (1, 2, 5)]
        inside = [(v, text) for v, text in found if low - 1e-9 <= v <= high + 1e-9]
        return inside[:: max(1, ceil(len(inside) / 5))]
    raw = (high - low) / 4
    size = 10.0 ** floor(log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    return [(i * step, f"{i * step:g}") for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1220px; padding: 0 1em; color: #222; }
svg { background: #fff; margin: 0 8px 8px 0; } svg text { font-size: 10px; fill: #444; }
svg .title { font-size: 12px; font-weight: 600; fill: #222; } .grid { stroke: #e4e4e4; fill: none; }
.line { fill: none; stroke-width: 1.6; } .bar { stroke-width: 1; opacity: .6; }
table { border-collapse: collapse; } th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } .key { display: inline-block; margin-right: 1.2em; }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
p.what { max-width: 75em; color: #444; }
"""

CURVES: tuple[tuple[str, str, bool], ...] = (
    ("ess", "effective sample size (share of the batch)", False),
    ("learning_rate_factor", "learning rate: factor of recipe and batch", False),
    ("grad_norm", "gradient norm before clipping", True),
    ("clip_frac", "share of tokens the trust rule changed", False),
    ("entropy", "entropy of the policy (nats)", False),
)
"""curve by step, title, logarithmic"""


def page_text(plan: Plan, cells: Path, records: Sequence[CellRecord], merits: Sequence[Merit]) -> str:
    """`cells`: folder of the curves."""
    curves = {r.name: read_curves(cells / f"{r.name}.json") for r in records if not r.failed}
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(plan.recipes)}
    failed = [r for r in records if r.failed]
    body = [
        f"<h1>{escape(plan.settings.name)}: how far off policy?</h1>",
        f'<p class="what">{len(records)} cells, {len(failed)} failed. In a cell with lag k the batch of step s was '
        "sampled by version max(0, s &minus; k) exactly. Curves are means over initial models and seeds at the "
        "recipe's best learning rate at that lag; bars are the standard deviation over them. "
        f"<b>Collapsed:</b> {escape(COLLAPSED)}. <b>Span:</b> factor between the lowest and the highest learning rate "
        f"that keep {HOLDS} of the task's best synchronous reward, edges interpolated; &gt;= where an end of the "
        "grid still holds. <b>Effective:</b> the mean learning rate really taken at the best one, after the factors of "
        "recipe and batch. <b>As synchronous:</b> which of reward and span are at least the best of any recipe at lag "
        "0.</p>",
    ]
    for task in plan.tasks:
        own = [m for m in merits if m.task == task]
        done = [r for r in records if r.task == task and not r.failed]
        if done:
            body += _task(task, own, done, curves, colours)
    if failed:
        body.append("<h2>Failed cells</h2><ul>")
        body += [f"<li>{escape(r.name)}: {escape(r.failed)}</li>" for r in failed]
        body.append("</ul>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(plan.settings.name)}</title>'
        f"<style>{STYLE}</style></head><body>" + "\n".join(body) + "</body></html>\n"
    )


def _task(
    task: str,
    merits: Sequence[Merit],
    records: Sequence[CellRecord],
    curves: dict[str, Curves],
    colours: dict[str, str],
) -> list[str]:
    lags = sorted({r.lag for r in records})
    shown = [label for label in colours if any(r.recipe == label for r in records)]
    keys = "".join(f'<span class="key"><i style="background:{colours[x]}"></i>{escape(x)}</span>' for x in shown)
    body = [f"<h2>Task {escape(task)}</h2><p>{keys}</p>", "<h3>Final reward</h3>"]
    axes = Axes(title="final reward at the best learning rate", x_label="lag (steps)")
    body.append(chart(axes, _against_lag(merits, colours)))
    for lag in lags:
        own = [m for m in merits if m.lag == lag]
        axes = Axes(title=f"lag {lag}: final reward", x_label="learning rate", log_x=True)
        body.append(chart(axes, [_against_rate(m, colours[m.recipe]) for m in own if len(m.rates) > 1]))
    body += ["<h3>Both figures of merit</h3>", _table(merits), "<h3>Reward of a version</h3>"]
    best = {(m.recipe, m.lag): m.best_learning_rate for m in merits}
    groups = {
        key: [curves[r.name] for r in records if (r.recipe, r.lag) == key and r.learning_rate == rate]
        for key, rate in best.items()
    }
    for lag in lags:
        lines = [
            Line(label=recipe, colour=colours[recipe], points=_mean_rewards(groups[recipe, lag]))
            for recipe in shown
            if (recipe, lag) in groups
        ]
        body.append(chart(Axes(title=f"lag {lag}: reward", x_label="version"), lines))
    for name, title, log in CURVES:
        body.append(f"<h3>{escape(title[0].upper() + title[1:])}</h3>")
        for lag in lags:
            lines = [
                Line(label=recipe, colour=colours[recipe], points=_mean_steps(groups[recipe, lag], name))
                for recipe in shown
                if (recipe, lag) in groups
            ]
            body.append(chart(Axes(title=f"lag {lag}: {title}", x_label="step", log_y=log), lines))
    return body


def _against_lag(merits: Iterable[Merit], colours: dict[str, str]) -> list[Line]:
    found: dict[str, list[Merit]] = {}
    for merit in sorted(merits, key=lambda m: m.lag):
        found.setdefault(merit.recipe, []).append(merit)
    return [
        Line(
            label=recipe,
            colour=colours[recipe],
            points=[(m.lag, m.best_reward) for m in own],
            spread=[m.best_spread for m in own],
        )
        for recipe, own in found.items()
    ]


def _against_rate(merit: Merit, colour: str) -> Line:
    return Line(
        label=merit.recipe,
        colour=colour,
        points=[(rate.learning_rate, rate.reward) for rate in merit.rates],
        spread=[rate.spread for rate in merit.rates],
    )


def _table(merits: Iterable[Merit]) -> str:
    rows = [merit_row(m) for m in sorted(merits, key=lambda m: (m.lag, -m.best_reward))]
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _mean_rewards(curves: Sequence[Curves]) -> list[tuple[float, float]]:
    pairs: list[tuple[float, float]] = []
    for one in curves:
        pairs += zip(one.versions, one.rewards, strict=True)
    return smoothed(_means(pairs))


def _mean_steps(curves: Sequence[Curves], name: str) -> list[tuple[float, float]]:
    pairs: list[tuple[float, float]] = []
    for one in curves:
        pairs += [(step, value) for step, value in enumerate(one.steps[name]) if value is not None]
    return _means(pairs)


def _means(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    by_x: dict[float, list[float]] = {}
    for x, y in pairs:
        by_x.setdefault(x, []).append(y)
    return [(x, fmean(by_x[x])) for x in sorted(by_x)]


def smoothed(points: Sequence[tuple[float, float]], reach: int = 4) -> list[tuple[float, float]]:
    """Mean over each point and up to `reach` neighbours on either side: a batch of rewards is noisy."""
    return [(x, fmean(y for _, y in points[max(0, i - reach) : i + reach + 1])) for i, (x, _) in enumerate(points)]
