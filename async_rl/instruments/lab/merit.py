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

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from statistics import fmean, stdev

from async_rl.instruments.lab.record import CellRecord

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
    """The figures of merit of one recipe at one lag on one task."""

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
