"""The watch for a collapse: what raises it, what does not, and that it stays raised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.config import GuardSettings
from async_rl.trainer.alarm import SIGNALS, CollapseWatch, watch

RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "recorded_curves.json").read_text())
"""trainings of the lab, collapsed ones and healthy ones; bench/LAB.md tells of all of them"""
Row = dict[str, float]


def healthy(steps: int, *, seed: int = 0, batch: int = 64, noise: float = 1.0, level: float = 0.5) -> list[Row]:
    """A run on a plateau: rewards of `batch` trajectories that succeed with probability `level`."""
    drawn = np.random.default_rng(seed)
    return [
        {
            "step": float(step),
            "reward/mean": float(drawn.binomial(batch, level)) / batch,
            "ess/ratio": (ess := float(np.clip(0.6 + 0.1 * noise * drawn.standard_normal(), 0.2, 1.0))),
            "ess/size": ess * batch,
            "ess/noise": 0.2,
            "entropy": float(np.exp(0.05 * noise * drawn.standard_normal())),
            "grad/norm": float(np.exp(0.3 * noise * drawn.standard_normal())),
        }
        for step in range(steps)
    ]


def with_end(rows: Sequence[Row], begin: int, **columns: float) -> list[Row]:
    """The same with other values from step `begin` on."""
    names = {"reward": "reward/mean", "ess": "ess/ratio", "reference": "ess/noise", "entropy": "entropy",
             "gradient": "grad/norm"}  # fmt: skip
    changed = {names[name]: value for name, value in columns.items()}
    if "ess" in columns:
        changed["ess/size"] = columns["ess"] * 64
    return [row | changed if row["step"] >= begin else row for row in rows]


def recorded_rows(curve: dict[str, Any]) -> list[Row]:
    rows = []
    for step in range(len(curve["entropy"])):
        row = {key: curve[key][step] for key in ("reward/mean", "ess/ratio", "entropy", "grad/norm")}
        row |= {"step": float(step), "ess/size": row["ess/ratio"] * curve["batch"]}
        if step < curve["critic_warmup"]:
            row["critic/warmup"] = 1.0
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


# ---------------------------------------------------------------------------------------------- one by one


@given(st.integers(0, 10**6), st.sampled_from([16, 64, 512]), st.floats(0.02, 0.98), st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_noise_around_a_plateau_raises_nothing(seed: int, batch: int, level: float, noise: float) -> None:
    found = watch(GuardSettings(), healthy(400, seed=seed, batch=batch, noise=noise, level=level))
    assert not found.raised
    assert set(found.columns().values()) == {0.0}


@pytest.mark.parametrize(
    ("columns", "signal"),
    [
        ({"ess": 0.03}, "ess"),
        ({"reference": 3.0}, "reference"),
        ({"entropy": 2.0}, "entropy"),
        ({"entropy": 0.05}, "entropy"),
        ({"gradient": 50.0}, "gradient"),
        ({"gradient": 0.001}, "gradient"),
        ({"gradient": nan}, "gradient"),
        ({"reward": 0.05}, "reward"),
    ],
)
def test_each_signal_raises_its_alarm_within_a_window_and_says_why(columns: dict[str, float], signal: str) -> None:
    rows = with_end(healthy(100), 60, **columns)
    if columns.get("entropy", 1) < 1 or columns.get("gradient", 1) < 1:
        rows = with_end(rows, 60, reward=0.3)  # no more than at the start
    found = watch(GuardSettings(), rows)
    assert list(found.raised) == [signal]
    alarm = next(iter(found.raised.values()))
    assert 60 <= alarm.step <= 70
    assert 50 <= alarm.since <= 60
    assert f"{alarm.step}" in alarm.reason
    assert any(character.isdigit() for character in alarm.reason)


def test_an_alarm_stays_up_when_the_signal_looks_healthy_again() -> None:
    rows = with_end(healthy(200), 60, ess=0.02)
    rows = [*rows[:80], *with_end(healthy(200), 80, ess=1.0)[80:]]  # after a total collapse it is 1
    guard = CollapseWatch(settings=GuardSettings())
    alarms = [alarm for row in rows for alarm in guard.check(row)]
    assert [alarm.signal for alarm in alarms] == ["ess"]
    assert guard.columns()["alarm/ess"] == 1.0


@pytest.mark.parametrize("columns", [{"entropy": 0.02}, {"gradient": 0.0001}])
def test_what_learning_takes_away_is_no_alarm_while_the_reward_is_higher(columns: dict[str, float]) -> None:
    assert not watch(GuardSettings(), with_end(healthy(100), 60, reward=0.95, **columns)).raised


def test_steps_without_a_gradient_count_as_none() -> None:
    rows = with_end(healthy(100), 60, reward=0.4)
    rows = [{k: v for k, v in row.items() if k != "grad/norm" or row["step"] < 60} for row in rows]
    assert list(watch(GuardSettings(), rows).raised) == ["gradient"]


def test_a_critic_that_warms_up_shows_no_gradient_of_the_policy() -> None:
    rows = [
        {k: v for k, v in row.items() if k != "grad/norm"} | {"critic/warmup": 1.0} if row["step"] < 30 else row
        for row in healthy(100)
    ]
    assert not watch(GuardSettings(), rows).raised


def test_long_answers_have_a_small_ess_from_the_start() -> None:
    assert not watch(GuardSettings(), with_end(healthy(100), 0, ess=0.04)).raised


def test_a_collapse_within_the_first_window_is_seen() -> None:
    rows = [*healthy(3), *with_end(healthy(40), 0, ess=0.02, reward=0.01)[3:]]
    found = watch(GuardSettings(), rows)
    assert found.raised["ess"].step == 9
    assert found.raised["reward"].step == 9
    assert found.newest_safe_version() == 0


def test_a_threshold_of_zero_turns_its_alarm_off() -> None:
    rows = with_end(healthy(100), 60, ess=0.02, reference=5.0, entropy=3.0, gradient=100.0, reward=0.01)
    assert set(watch(GuardSettings(), rows).raised) == set(SIGNALS)
    for signal in SIGNALS:
        assert set(watch(replace(GuardSettings(), **{signal: 0.0}), rows).raised) == set(SIGNALS) - {signal}


@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_batches_without_fresh_data_do_not_count_for_the_reference(spread: float) -> None:
    """Most rows of a run at a large lag have no fresh token; it takes a window of those that do."""
    rows = [
        {key: value for key, value in row.items() if key != "ess/noise" or row["step"] % 5 == 0}
        for row in with_end(healthy(200), 60, reference=spread)
    ]
    found = watch(GuardSettings(), rows).raised
    assert set(found) == ({"reference"} if spread > 1 else set())
    assert not found or found["reference"].step in range(60, 111)


def test_one_would_go_back_to_a_window_before_the_first_sign() -> None:
    guard = watch(GuardSettings(), healthy(100))
    assert 100 - 3 * 10 <= guard.newest_safe_version() <= 100 - 2 * 10 + 1
    before = guard.newest_safe_version()
    for row in with_end(healthy(140), 100, entropy=1.2)[100:]:  # on the way, not there
        guard.check(row)
    assert not guard.raised
    assert guard.newest_safe_version() <= before + 10


@pytest.mark.parametrize("fresh", [5, 30])
def test_a_signal_of_which_little_was_seen_does_not_send_the_run_back_to_its_start(fresh: int) -> None:
    """Of fresh data, say, of which a run at a large lag has some at its start only."""
    rows = healthy(100)
    seen = [r if r["step"] < fresh else {k: v for k, v in r.items() if k != "ess/noise"} for r in rows]
    assert watch(GuardSettings(), seen).newest_safe_version() == watch(GuardSettings(), rows).newest_safe_version() > 0


def test_a_signal_that_usually_stands_half_way_does_not_send_the_run_back_to_its_start() -> None:
    rows = with_end(healthy(600), 30, ess=0.12)  # as at a large lag
    rows = [*rows[:500], *with_end(rows, 500, reward=0.05)[500:]]
    guard = CollapseWatch(settings=GuardSettings())
    alarms = [alarm for row in rows for alarm in guard.check(row)]
    assert [alarm.signal for alarm in alarms] == ["reward"]
    assert 480 <= alarms[0].since <= 500
    assert guard.newest_safe_version() >= 470


@given(st.integers(0, 100), st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_the_state_follows_from_the_rows_wherever_a_run_was_stopped(cut: int, seed: int) -> None:
    rows = with_end(healthy(100, seed=seed), 70, ess=0.03, reward=0.1)
    resumed = watch(GuardSettings(), json.loads(json.dumps(rows[:cut])))
    for row in rows[cut:]:
        resumed.check(row)
    assert resumed == watch(GuardSettings(), rows)


# ------------------------------------------------------------------------------------------------ recorded


@pytest.mark.parametrize("curve", [c for c in RECORDED if c["collapsed"]], ids=lambda c: c["name"])
def test_recorded_collapses_are_caught(curve: dict[str, Any]) -> None:
    rows = recorded_rows(curve)
    found = watch(GuardSettings(), rows)
    assert found.raised
    first = min(alarm.step for alarm in found.raised.values())
    rewards = np.array([row["reward/mean"] for row in rows])
    assert rewards[-10:].mean() < 0.7 * rewards[:10].mean() or rewards[-10:].mean() < 0.05
    assert first < 100, found.raised


@pytest.mark.parametrize("curve", [c for c in RECORDED if not c["collapsed"]], ids=lambda c: c["name"])
def test_recorded_healthy_trainings_raise_nothing(curve: dict[str, Any]) -> None:
    found = watch(GuardSettings(), recorded_rows(curve))
    # one of them lost half of its reward for some twenty steps: the alarm is true, and wrong about the end
    assert set(found.raised) == ({"reward"} if curve["slump"] else set())
