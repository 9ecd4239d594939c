"""lab.html: the plots and tables of a lab in one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from async_rl.lab.stability.chart import COLOURS, Axes, Line, chart
from async_rl.lab.stability.merit import HOLDS, Merit
from async_rl.lab.stability.plan import Plan
from async_rl.lab.stability.record import COLLAPSED, CellRecord, Curves, read_curves
from async_rl.lab.stability.table import HEAD, merit_row

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
    return [
        (x, fmean(y for _, y in points[max(0, i - reach) : i + reach + 1])) for i, (x, _) in enumerate(points)
    ]
