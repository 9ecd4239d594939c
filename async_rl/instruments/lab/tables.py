"""Text tables of a lab: figures of merit, rewards by learning rate, and one line a finished cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from async_rl.instruments.lab.merit import Merit, Rate
from async_rl.instruments.lab.record import CellRecord

HEAD = (
    "recipe", "lag", "best reward", "of synchronous", "of its own", "at rate", "effective", "span of rates",
    "as synchronous", "collapsed",
)  # fmt: skip


def merit_lines(merits: Iterable[Merit]) -> list[str]:
    """One table a task: every recipe and lag with both figures of merit."""
    lines: list[str] = []
    for task, found in by_task(merits).items():
        rows = [HEAD, *map(merit_row, by_lag(found))]
        lines += ["", f"task {task}", *columns(rows)]
    return lines


def by_task(merits: Iterable[Merit]) -> dict[str, list[Merit]]:
    found: dict[str, list[Merit]] = defaultdict(list)
    for merit in merits:
        found[merit.task].append(merit)
    return found


def by_lag(merits: Iterable[Merit]) -> list[Merit]:
    """The best recipe of each lag first."""
    return sorted(merits, key=lambda m: (m.lag, -m.best_reward))


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
    lines: list[str] = []
    for task, found in by_task(merits).items():
        rates = sorted({rate.learning_rate for m in found for rate in m.rates})
        rows = [("recipe", "lag", *(f"at {rate:g}" for rate in rates))]
        for m in by_lag(found):
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
