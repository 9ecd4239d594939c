"""lab.html: a lab's curves and tables on the page that `report` uses (observe/page): no network, nothing to install."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from async_rl.instruments.lab.merit import HOLDS, Merit
from async_rl.instruments.lab.plan import LabPlan
from async_rl.instruments.lab.record import COLLAPSED, STEP_CURVES, CellRecord, Curves, read_curves
from async_rl.instruments.lab.tables import HEAD, by_lag, merit_row
from async_rl.observe.glossary import meaning
from async_rl.observe.report import page

DIGITS = 5
"""significant digits of what is drawn"""
STEP_CHARTS: tuple[tuple[str, str, bool], ...] = (
    ("ess", "effective sample size", False),
    ("learning_rate_factor", "learning-rate factor", False),
    ("grad_norm", "gradient norm", True),
    ("clip_frac", "clipped tokens", False),
    ("entropy", "entropy", False),
)
"""curve by step, title, logarithmic axis"""
WORDS = (
    ("lag", "in a cell with lag k the batch of step s was sampled by version max(0, s - k) exactly"),
    (
        "curves",
        "means over initial models and seeds at the recipe's best learning rate at that lag; bands around final "
        "rewards are one standard deviation over them",
    ),
    ("collapsed", COLLAPSED),
    (
        "span",
        f"factor between the lowest and the highest learning rate that keep {HOLDS} of the task's best synchronous "
        "reward, edges interpolated; >= where an end of the grid still holds",
    ),
    ("effective", "the mean learning rate really taken at the best one, after the factors of recipe and batch"),
    ("as synchronous", "which of reward and span are at least the best of any recipe at lag 0"),
)
"""what the words on the page mean"""
Points = Sequence[tuple[float, float, float]]
"""(x, y, standard deviation)"""


def page_text(plan: LabPlan, cells: Path, records: Sequence[CellRecord], merits: Sequence[Merit]) -> str:
    """The whole page. `cells`: folder of the cells' records."""
    return page(lab_data(plan, cells, records, merits), title=plan.settings.name, kind="lab")


def lab_data(plan: LabPlan, cells: Path, records: Sequence[CellRecord], merits: Sequence[Merit]) -> dict[str, Any]:
    """Everything the page shows, as plain values. Each recipe is what a run is in a report: a name and its curves."""
    done = [record for record in records if not record.failed]
    curves = {record.name: read_curves(cells / f"{record.name}.json") for record in done}
    failed = [[record.name, record.failed] for record in records if record.failed]
    drawn: dict[str, dict[str, Any]] = {recipe: {} for recipe in plan.recipes}
    tasks = []
    meanings: dict[str, str] = {}
    for task in plan.tasks:
        cells_of_task = [record for record in done if record.task == task]
        if cells_of_task:
            own = [merit for merit in merits if merit.task == task]
            charts = TaskCharts(task, own, cells_of_task, curves, drawn)
            rows = [HEAD, *map(merit_row, by_lag(own))]
            tasks.append({"name": task, "charts": charts.all(), "table": rows})
            meanings |= charts.meanings
    return {
        "summary": f"{plan.settings.name}: how far off policy? {len(records)} cells, {len(failed)} failed.",
        "runs": [{"name": recipe, "curves": found} for recipe, found in drawn.items()],
        "words": WORDS,
        "tasks": tasks,
        "failed": failed,
        "meanings": meanings,
    }


class TaskCharts:
    """The charts of one task; their curves go into `drawn`, by recipe and key."""

    def __init__(
        self,
        task: str,
        merits: Sequence[Merit],
        records: Sequence[CellRecord],
        curves: Mapping[str, Curves],
        drawn: dict[str, dict[str, Any]],
    ) -> None:
        self.task, self.merits, self.drawn = task, merits, drawn
        self.lags = sorted({record.lag for record in records})
        best = {(m.recipe, m.lag): m.best_learning_rate for m in merits}
        self.best: dict[tuple[str, int], list[Curves]] = defaultdict(list)
        """(recipe, lag) -> curves of the replicates at the best learning rate"""
        for record in records:
            if best.get((record.recipe, record.lag)) == record.learning_rate:
                self.best[record.recipe, record.lag].append(curves[record.name])
        self.meanings: dict[str, str] = {}

    def all(self) -> list[dict[str, Any]]:
        """Final rewards against lag and against learning rate, then what happened on the way."""
        charts = [self._rewards_by_lag(), *filter(None, map(self._rewards_by_rate, self.lags))]
        for lag in self.lags:
            points = {recipe: mean_rewards(found) for recipe, found in self._replicates(lag)}
            charts.append(self._chart("reward of a version", f"lag {lag}: reward", points))
        for name, title, log in STEP_CHARTS:
            for lag in self.lags:
                points = {recipe: mean_steps(found, name) for recipe, found in self._replicates(lag)}
                chart = self._chart(title, f"lag {lag}: {title}", points, log=log)
                self.meanings[chart["keys"][0]] = meaning(STEP_CURVES[name])
                charts.append(chart)
        return [chart for chart in charts if chart["filled"]]

    def _replicates(self, lag: int) -> list[tuple[str, list[Curves]]]:
        return [(recipe, found) for (recipe, own), found in self.best.items() if own == lag]

    def _rewards_by_lag(self) -> dict[str, Any]:
        points: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for m in sorted(self.merits, key=lambda m: m.lag):
            points[m.recipe].append((m.lag, m.best_reward, m.best_spread))
        return self._chart("final reward", "final reward at the best learning rate", points, x="lag (steps)")

    def _rewards_by_rate(self, lag: int) -> dict[str, Any] | None:
        points = {
            m.recipe: [(rate.learning_rate, rate.reward, rate.spread) for rate in m.rates]
            for m in self.merits
            if m.lag == lag and len(m.rates) > 1
        }
        title = f"lag {lag}: final reward by learning rate"
        return self._chart("final reward", title, points, x="learning rate", log_x=True) if points else None

    def _chart(self, section: str, title: str, points: Mapping[str, Points], **axes: Any) -> dict[str, Any]:
        key = f"{self.task}/{title}"
        for recipe, found in points.items():
            if found:
                self.drawn[recipe][key] = curve_of(found)
        filled = any(points.values())
        return {"section": section, "title": title, "keys": [key], "by_run": True, "filled": filled, **axes}


def curve_of(points: Points) -> dict[str, Any]:
    """As observe/page/charts.js reads a curve. The band is left out where every deviation is 0."""
    finite = [(x, y, s) for x, y, s in points if isfinite(y)]
    short: Callable[[float], float] = lambda value: float(f"{value:.{DIGITS}g}")  # noqa: E731
    curve: dict[str, Any] = {
        "x": [x for x, _, _ in finite],
        "y": [short(y) for _, y, _ in finite],
        "bad": len(points) - len(finite),
    }
    if any(s for _, _, s in finite):
        curve |= {"lo": [short(y - s) for _, y, s in finite], "hi": [short(y + s) for _, y, s in finite]}
    return curve


def mean_rewards(curves: Iterable[Curves]) -> Points:
    """Of each version, over replicates."""
    return _means(pair for one in curves for pair in zip(one.versions, one.rewards, strict=True))


def mean_steps(curves: Iterable[Curves], name: str) -> Points:
    """Of each step, over replicates."""
    return _means((step, value) for one in curves for step, value in enumerate(one.steps[name]) if value is not None)


def _means(pairs: Iterable[tuple[float, float]]) -> Points:
    by_x: dict[float, list[float]] = defaultdict(list)
    for x, y in pairs:
        by_x[x].append(y)
    return [(x, fmean(by_x[x]), 0.0) for x in sorted(by_x)]
