"""Figures of merit and the definition of a collapse, against tables worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest

from async_rl.instruments.lab.merit import Merit, longest_run, merits
from async_rl.instruments.lab.record import CellRecord, Curves, has_collapsed, summarise
from async_rl.instruments.lab.tables import merit_row, rate_lines


def record(recipe: str, lag: int, rate: float, final: float, *, seed: int = 0, failed: str = "") -> CellRecord:
    return CellRecord(
        name=f"{recipe}{lag}{rate}{seed}",
        task="sort",
        warm_up="w0",
        recipe=recipe,
        lag=lag,
        learning_rate=rate,
        seed=seed,
        digest="",
        failed=failed,
        reward_final=None if failed else final,
        collapsed=final < 0.3,
    )


def one(found: list[Merit], recipe: str, lag: int) -> Merit:
    return next(m for m in found if (m.recipe, m.lag) == (recipe, lag))


def test_figures_of_merit_of_a_table_worked_out_by_hand() -> None:
    # synchronous best: the mean of a at 1e-3, (0.9 + 0.7) / 2 = 0.8; what holds keeps 0.68
    found = merits(
        [
            record("a", 0, 1e-4, 0.50),
            record("a", 0, 1e-3, 0.90),
            record("a", 0, 1e-3, 0.70, seed=1),
            record("b", 0, 1e-3, 0.60),
            record("a", 8, 1e-4, 0.60),
            record("a", 8, 2e-4, 0.70),
            record("a", 8, 8e-4, 0.72),
            record("a", 8, 1.6e-3, 0.20),
            record("b", 8, 1e-4, 0.10),
            record("b", 8, 1e-3, 0.0, failed="out of memory"),
        ]
    )
    sync = one(found, "a", 0)
    assert (sync.best_learning_rate, sync.best_reward, sync.share_of_synchronous) == (1e-3, pytest.approx(0.8), 1.0)
    assert sync.best_spread == pytest.approx(0.1 * 2**0.5)
    assert (sync.span, sync.open_below, sync.open_above) == (1.0, False, True)
    # 0.68 lies 0.6 of the way from 0.5 to 0.8, in log(rate)
    assert sync.span_interpolated == pytest.approx(1e-3 / exp(log(1e-4) + 0.6 * log(10)))

    lagged = one(found, "a", 8)
    assert (lagged.best_learning_rate, lagged.best_reward) == (8e-4, 0.72)
    assert lagged.share_of_synchronous == pytest.approx(0.9)
    assert lagged.span == pytest.approx(4.0)
    low = exp(log(2e-4) + 0.2 * log(1 / 2))  # (0.70 - 0.68) / (0.70 - 0.60) of the way down
    high = exp(log(8e-4) + (0.04 / 0.52) * log(2))
    assert lagged.span_interpolated == pytest.approx(high / low)
    assert (lagged.open_below, lagged.open_above) == (False, False)
    assert [rate.collapsed for rate in lagged.rates] == [0, 0, 0, 1]

    # the widest synchronous span is a's, 2.5 (0.6 of a decade is 4): reward is not kept at lag 8, the span is
    assert lagged.share_of_own == pytest.approx(0.9)
    assert (sync.keeps_reward, sync.keeps_span) == (True, True)
    assert (lagged.keeps_reward, lagged.keeps_span) == (False, high / low >= sync.span_interpolated)
    assert [rate.holds for rate in lagged.rates] == [False, True, True, False]

    lost = one(found, "b", 8)
    assert (lost.span, lost.span_interpolated, lost.best_reward) == (0.0, 0.0, 0.10)
    assert [rate.learning_rate for rate in lost.rates] == [1e-4], "a failed cell says nothing about its rate"


def test_a_recipe_that_keeps_both_figures_says_so_and_shows_the_learning_rate_it_really_took() -> None:
    found = merits(
        [
            record("a", 0, 1e-4, 0.50),
            record("a", 0, 1e-3, 0.80),
            replace(record("b", 8, 1e-4, 0.70), learning_rate_factor_mean=0.75),
            replace(record("b", 8, 1e-3, 0.80), learning_rate_factor_mean=0.5),
            replace(record("b", 8, 1e-3, 0.84, seed=1), learning_rate_factor_mean=0.3),
            record("c", 8, 1e-3, 0.82),
        ]
    )
    b, c = one(found, "b", 8), one(found, "c", 8)
    assert (b.keeps_reward, b.keeps_span, b.share_of_own) == (True, True, None)
    assert b.best_rate.effective == pytest.approx(0.4e-3)
    assert (c.keeps_reward, c.keeps_span, c.best_rate.factor) == (True, False, 1.0)
    assert merit_row(b)[-2:] == ("both", "0 of 3")
    assert merit_row(c)[-2:] == ("reward", "0 of 1")
    lines = rate_lines(found)
    assert "0.820 (0.40) *" in next(line for line in lines if line.startswith("b"))
    assert "0.500" in next(line for line in lines if line.startswith("a"))


def test_a_task_without_a_synchronous_cell_has_no_yardstick() -> None:
    assert merits([record("a", 8, 1e-3, 0.5)]) == []
    assert merits([record("a", 0, 1e-3, 0.0), record("a", 8, 1e-3, 0.5)]) == []


@pytest.mark.parametrize(
    ("holds", "run"),
    [("", (0, -1)), ("0", (0, -1)), ("1", (0, 0)), ("0110", (1, 2)), ("11011", (0, 1)), ("10111", (2, 4))],
)
def test_the_longest_run_of_neighbours(holds: str, run: tuple[int, int]) -> None:
    assert longest_run([h == "1" for h in holds]) == run


def test_collapsed_is_below_half_of_the_best_or_below_the_start() -> None:
    assert has_collapsed(first=0.1, best=0.8, final=0.39)
    assert not has_collapsed(first=0.1, best=0.8, final=0.4)
    assert has_collapsed(first=0.3, best=0.4, final=0.29)
    assert not has_collapsed(first=0.3, best=0.4, final=0.3)


def test_the_numbers_of_a_record_are_those_of_its_curves() -> None:
    # 20 steps, so a tenth is two versions; versions 12 to 17 were not measured
    versions = [*range(12), 18, 19]
    rewards = [0.1] * 4 + [0.5, 0.6, 0.7, 0.6] + [0.4] * 4 + [0.2, 0.3]
    steps: dict[str, list[float | None]] = {
        name: [1.0] * 20
        for name in ("reward_batch", "ess", "grad_norm", "clip_frac", "rejected", "learning_rate_factor", "entropy")
    }
    steps["ess"] = [1.0, 0.5, None, 0.25, *[0.75] * 16]
    steps["grad_norm"] = [2.0, float("nan"), 7.0, *[1.0] * 17]
    found = summarise(Curves(versions=versions, rewards=rewards, steps=steps), steps=20, reward_first=0.11)
    assert found["reward_first"] == 0.11
    assert found["reward_final"] == pytest.approx(0.25)
    assert found["reward_best"] == pytest.approx(0.65)
    assert found["collapsed"] is True
    assert (found["ess_min"], found["grad_norm_max"]) == (0.25, 7.0)
    assert found["ess_mean"] == pytest.approx((1.0 + 0.5 + 0.25 + 16 * 0.75) / 19)
