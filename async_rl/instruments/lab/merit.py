"""Two figures of merit for a recipe at a lag: how good at its best learning rate, and over which span.

The yardstick of a task is its synchronous best: the highest mean final reward of any recipe at lag 0 and any
learning rate. A learning rate *holds* when the mean over replicates (initial models x seeds) keeps 0.85 of it.
The span is the factor between the lowest and the highest learning rate of the longest run of neighbours on the
grid that hold: 0 when none does, 1 when one does. Between a rate that holds and a neighbour that does not, the
edge is also interpolated linearly in log(rate): rewards change smoothly over a factor of two or three more
often than they jump, and without it every span is one of the few ratios that the grid has. Both are reported.
An edge at the end of the grid is open: the span is at least that.

A lag *costs nothing* by a figure when the recipe there has at least the task's best synchronous value of it: the
best reward, and the widest span, of any recipe at lag 0. A recipe may keep its reward by training slower where data is
stale (an ESS scale does), so the mean learning rate that was really taken stands beside the one that was asked for.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, exp, isfinite, log
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from async_rl.run_folder import replace_text

# -------------------- record
# What a cell leaves behind: its curves, and the numbers drawn from them.

COLLAPSED = (
    "reward_final is below half of reward_best, or below reward_first. Rewards are those of a version, measured on "
    "the episodes it sampled, whenever those were trained: reward_final is the mean over the last tenth of the "
    "versions 0 .. steps - 1, reward_best the best mean over as many versions in a row, reward_first that of the "
    "initial model on held-out problems"
)
"""the definition, as lab.json and the page state it"""

STEP_CURVES = {
    "reward_batch": "reward/mean",
    "ess": "ess/ratio",
    "grad_norm": "grad/norm",
    "clip_frac": "clip/frac",
    "rejected": "reject/tokens",
    "learning_rate_factor": "",
    "entropy": "entropy",
    "length": "len/mean",
}
"""curve by step -> the metric it shows"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Of one cell."""

    versions: list[int]
    """whose reward was measured, ascending"""
    rewards: list[float]
    """mean reward of each on the episodes it sampled"""
    steps: Mapping[str, list[float | None]]
    """by training step: the keys of STEP_CURVES; None where a step had none (it was skipped)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRecord:
    """One cell, finished or failed. `failed` tells why, or is empty; the numbers of a failed cell are None."""

    name: str
    task: str
    warm_up: str
    recipe: str
    lag: int
    learning_rate: float
    seed: int
    digest: str
    """of the settings it was trained with"""
    failed: str = ""
    reward_first: float | None = None
    reward_final: float | None = None
    reward_best: float | None = None
    collapsed: bool | None = None
    ess_min: float | None = None
    ess_mean: float | None = None
    grad_norm_max: float | None = None
    clip_frac_mean: float | None = None
    learning_rate_factor_mean: float | None = None
    steps_skipped: int | None = None
    seconds: float | None = None
    """wall time"""
    processor_seconds: float | None = None
    curves: str = ""
    """file with its curves, relative to the lab's folder"""
    detail: Mapping[str, Any] = field(default_factory=dict)


def summarise(curves: Curves, *, steps: int, reward_first: float) -> dict[str, Any]:
    """The numbers of a record that come from its curves."""
    tenth = ceil(steps / 10)
    final = window_mean(curves, steps - tenth, steps)
    assert final is not None, "the last tenth was measured"
    windows = [window_mean(curves, end - tenth, end) for end in range(tenth, steps + 1)]
    best = max(mean for mean in windows if mean is not None)

    def values(name: str) -> list[float]:
        return [value for value in curves.steps[name] if value is not None and isfinite(value)]

    def over(name: str, what: Any) -> float | None:
        found = values(name)
        return what(found) if found else None

    return {
        "reward_first": reward_first,
        "reward_final": final,
        "reward_best": best,
        "collapsed": has_collapsed(first=reward_first, best=best, final=final),
        "ess_min": over("ess", min),
        "ess_mean": over("ess", fmean),
        "grad_norm_max": over("grad_norm", max),
        "clip_frac_mean": over("clip_frac", fmean),
        "learning_rate_factor_mean": over("learning_rate_factor", fmean),
    }


def has_collapsed(*, first: float, best: float, final: float) -> bool:
    """See COLLAPSED."""
    return final < 0.5 * best or final < first


def window_mean(curves: Curves, first: int, end: int) -> float | None:
    """Mean reward of the measured versions first <= version < end."""
    found = [reward for version, reward in zip(curves.versions, curves.rewards, strict=True) if first <= version < end]
    return fmean(found) if found else None


def write_record(path: Path, record: CellRecord, curves: Curves | None = None) -> None:
    """The curves first: a record that is there is whole."""
    if curves is not None:
        replace_text(curves_path(path), json.dumps(_plain(asdict(curves))) + "\n")
    replace_text(path, json.dumps(_plain(asdict(record)), indent=1) + "\n")


def curves_path(record: Path) -> Path:
    """`curves/NAME.json` for `cells/NAME.json`."""
    return record.parent.with_name("curves") / record.name


def read_record(path: Path) -> CellRecord | None:
    """None when there is none, or it is not readable: the cell is then run again."""
    try:
        return CellRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_curves(path: Path) -> Curves:
    return Curves(**json.loads(curves_path(path).read_text()))


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value


HOLDS = 0.85
"""share of the synchronous best that a learning rate has to keep"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One learning rate of a recipe at a lag, over its replicates."""

    learning_rate: float
    reward: float
    """mean final reward"""
    spread: float
    """sample standard deviation over replicates; 0 for one"""
    replicates: int
    collapsed: int
    """replicates that collapsed"""
    factor: float
    """mean over steps and replicates of what recipe and batch (ESS, kappa) made of the learning rate; 1: nothing"""
    holds: bool = False
    """keeps HOLDS of the task's synchronous best"""

    @property
    def effective(self) -> float:
        """The mean learning rate that was taken, warm-up and schedule left out."""
        return self.learning_rate * self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Merit:
    """Of one recipe at one lag on one task."""

    task: str
    recipe: str
    lag: int
    rates: tuple[Rate, ...]
    """ascending"""
    best_learning_rate: float
    best_reward: float
    best_spread: float
    share_of_synchronous: float
    """best_reward over the task's synchronous best"""
    share_of_own: float | None
    """best_reward over the recipe's own best at lag 0; None where it has no cell there"""
    span: float
    """factor between the lowest and highest learning rate that hold; 0: none does"""
    span_interpolated: float
    open_below: bool
    """the lowest learning rate of the grid holds"""
    open_above: bool
    keeps_reward: bool
    """best_reward is at least the task's synchronous best"""
    keeps_span: bool
    """span_interpolated is at least the widest synchronous one on the task"""

    @property
    def best_rate(self) -> Rate:
        return next(rate for rate in self.rates if rate.learning_rate == self.best_learning_rate)


def merits(records: Iterable[CellRecord]) -> list[Merit]:
    """By task, recipe and lag. A task without a finished cell at lag 0, or whose best there is not above 0, has no
    yardstick and is left out."""
    finals: dict[tuple[str, str, int], dict[float, list[CellRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if not record.failed:
            finals[record.task, record.recipe, record.lag][record.learning_rate].append(record)
    rates = {key: tuple(_rate(r, found[r]) for r in sorted(found)) for key, found in finals.items()}
    best = synchronous_best(rates)
    found = [
        _merit(*key, rates=rates[key], yardstick=best[key[0]]) for key in sorted(rates) if best.get(key[0], 0.0) > 0
    ]
    return _compared(found)


def synchronous_best(rates: dict[tuple[str, str, int], tuple[Rate, ...]]) -> dict[str, float]:
    """By task."""
    best: dict[str, float] = {}
    for (task, _, lag), found in rates.items():
        if lag == 0:
            best[task] = max(best.get(task, 0.0), *(rate.reward for rate in found))
    return best


def _rate(learning_rate: float, records: Sequence[CellRecord]) -> Rate:
    finals = [record.reward_final for record in records if record.reward_final is not None]
    return Rate(
        learning_rate=learning_rate,
        reward=fmean(finals),
        spread=stdev(finals) if len(finals) > 1 else 0.0,
        replicates=len(finals),
        collapsed=sum(bool(record.collapsed) for record in records),
        factor=fmean([1.0 if r.learning_rate_factor_mean is None else r.learning_rate_factor_mean for r in records]),
    )


def _merit(task: str, recipe: str, lag: int, *, rates: tuple[Rate, ...], yardstick: float) -> Merit:
    least = HOLDS * yardstick
    rates = tuple(replace(rate, holds=rate.reward >= least) for rate in rates)
    best = max(rates, key=lambda rate: rate.reward)
    first, last = longest_run([rate.holds for rate in rates])
    span = interpolated = 0.0
    if first <= last:
        span = rates[last].learning_rate / rates[first].learning_rate
        low = edge(rates[first], rates[first - 1], least) if first > 0 else rates[first].learning_rate
        high = edge(rates[last], rates[last + 1], least) if last + 1 < len(rates) else rates[last].learning_rate
        interpolated = high / low
    return Merit(
        task=task,
        recipe=recipe,
        lag=lag,
        rates=rates,
        best_learning_rate=best.learning_rate,
        best_reward=best.reward,
        best_spread=best.spread,
        share_of_synchronous=best.reward / yardstick,
        share_of_own=None,
        span=span,
        span_interpolated=interpolated,
        open_below=first == 0 and first <= last,
        open_above=last == len(rates) - 1 and first <= last,
        keeps_reward=best.reward >= yardstick,
        keeps_span=False,
    )


def _compared(found: Sequence[Merit]) -> list[Merit]:
    """With what needs the merits of other lags: the recipe's own at lag 0, and the widest span there."""
    own = {(m.task, m.recipe): m.best_reward for m in found if m.lag == 0}
    widest: dict[str, float] = {}
    for m in found:
        if m.lag == 0:
            widest[m.task] = max(widest.get(m.task, 0.0), m.span_interpolated)
    return [
        replace(
            m,
            share_of_own=m.best_reward / own[m.task, m.recipe] if own.get((m.task, m.recipe)) else None,
            keeps_span=m.span_interpolated >= widest[m.task] > 0,
        )
        for m in found
    ]


def longest_run(holds: Sequence[bool]) -> tuple[int, int]:
    """First and last index of the longest run of True, the first of equal ones; (0, -1) without any."""
    best, begin = (0, -1), 0
    for index, held in enumerate(holds):
        if not held:
            begin = index + 1
        elif index - begin > best[1] - best[0]:
            best = (begin, index)
    return best


def edge(holding: Rate, failing: Rate, least: float) -> float:
    """The learning rate between the two at which the reward, linear in its logarithm, is `least`."""
    share = (holding.reward - least) / (holding.reward - failing.reward)
    return exp(log(holding.learning_rate) + share * (log(failing.learning_rate) - log(holding.learning_rate)))
