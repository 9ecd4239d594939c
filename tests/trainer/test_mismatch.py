"""What is said when engine and trainer disagree at equal weights: when, once, and with settings that load."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_run import quick_settings

from async_rl.config import Settings
from async_rl.objective.conflicts import check_effect
from async_rl.objective.library import list_recipes, load_recipe
from async_rl.objective.mismatch import EngineArithmetic, bounds_of, remedy_of
from async_rl.trainer.mismatch_watch import make_mismatch_watch

HALF = EngineArithmetic(half=True, rounds_logits=False)


def settings(*words: str) -> Settings:
    return quick_settings(Path("model"), *(() if "guard.alarms=false" in words else ("guard.window=3",)), *words)


def rows(mismatch: float, number: int, *, length: float = 100.0, first: int = 0) -> list[dict[str, float]]:
    return [{"step": float(first + i), "kl/mismatch": mismatch, "len/mean": length} for i in range(number)]


@pytest.mark.parametrize(("recipe", "over", "width"), [
    ("grpo", "token", math.log(1.2)), ("icepop", "token", math.log(2)), ("gspo", "mean", 3e-4),
    ("vcpo", "sum", math.log(8)), ("tis", "token", math.log(2)), ("mis", "token", math.log(2)),
])  # fmt: skip
def test_the_spread_is_held_against_the_recipes_own_bounds(recipe: str, over: str, width: float) -> None:
    found = bounds_of(load_recipe({"name": recipe}))
    assert found.over == over
    assert found.width == pytest.approx(width, rel=1e-3)
    for length in (1.0, 50.0, 4000.0):
        level = found.level(0.5, length)
        assert found.spread(level, length) == pytest.approx(found.width / 2)


def test_the_spread_is_that_of_log_ratios_of_equal_weights() -> None:
    """Normal differences d, of the tokens' own log-probs: by kl/mismatch alone, and pooled over trajectories."""
    random = np.random.default_rng(0)
    d = random.normal(0.0, 0.04, (4000, 60))
    mismatch = float((np.exp(d) - 1 - d).mean())
    for recipe, pooled in (("grpo", d), ("gspo", d.mean(1)), ("vcpo", d.sum(1))):
        assert bounds_of(load_recipe({"name": recipe})).spread(mismatch, 60) == pytest.approx(pooled.std(), rel=0.03)


def test_it_is_said_once_when_the_median_of_a_window_is_above_the_level() -> None:
    watch = make_mismatch_watch(settings("recipe=grpo"))
    level = watch.bounds.level(0.5, 100.0)
    assert level == pytest.approx(0.0042, rel=0.02)
    assert all(watch.check(row) is None for row in rows(0.9 * level, 9))
    said = [watch.check(row) for row in [*rows(2 * level, 3, first=9), *rows(2 * level, 9, first=12)]]
    (found,) = (one for one in said if one is not None)
    assert found.step == 10
    assert (found.mismatch, found.level) == (pytest.approx(2 * level), pytest.approx(level))
    assert "recipe.trust.clip_low and clip_high" in found.reason


def test_a_resumed_run_says_it_where_the_whole_run_would() -> None:
    every = rows(0.02, 5)
    whole, resumed = make_mismatch_watch(settings("recipe=grpo")), make_mismatch_watch(settings("recipe=grpo"))
    said = [whole.check(row) for row in every]
    resumed.rebuild(every[:2])
    assert [resumed.check(row) for row in every[2:]] == said[2:]
    again = make_mismatch_watch(settings("recipe=grpo"))
    again.rebuild(every[:4])
    assert again.check(every[4]) is None


@pytest.mark.parametrize("words", [
    ("guard.mismatch=0",), ("guard.alarms=false",), ("guard.mismatch=50",),
])  # fmt: skip
def test_it_can_be_turned_off(words: tuple[str, ...]) -> None:
    watch = make_mismatch_watch(settings("recipe=grpo", *words))
    assert all(watch.check(row) is None for row in rows(0.02, 30))


def test_steps_without_fresh_tokens_say_nothing() -> None:
    watch = make_mismatch_watch(settings("recipe=grpo"))
    assert all(watch.check(row) is None for row in [{"step": 0.0}, {"step": 1.0, "kl/mismatch": math.nan}] * 9)


def test_the_engine_comes_first_where_it_rounds_what_the_trainer_does_not() -> None:
    rounding = EngineArithmetic(half=True, rounds_logits=True)
    grpo = load_recipe({"name": "grpo"})
    assert "vllm.head_dtype=float32" in remedy_of(grpo, rounding, 0.01, updates=1)
    assert "generator.quantization=none" in remedy_of(grpo, EngineArithmetic(
        half=True, rounds_logits=False, quantization="fp8"), 0.01, updates=1)  # fmt: skip
    assert "not arithmetic alone" in remedy_of(grpo, HALF, 0.3, updates=1)
    assert "set recipe.trust.rule=interval recipe.trust.low=0.5 recipe.trust.high=5.0" in remedy_of(
        grpo, HALF, 0.01, updates=1
    )
    assert "recipe.ratio.denominator=proximal" in remedy_of(grpo, HALF, 0.01, updates=2)
    assert "recipe" not in remedy_of(load_recipe({"name": "icepop"}), HALF, 0.045, updates=1)


@pytest.mark.parametrize("updates", [1, pytest.param(4, marks=pytest.mark.nightly)])
def test_every_setting_that_it_names_loads_and_makes_the_spread_a_smaller_share_of_the_bounds(updates: int) -> None:
    named = 0
    for name in list_recipes():
        recipe = load_recipe({"name": name})
        said = remedy_of(recipe, EngineArithmetic(half=False, rounds_logits=False), 0.01, updates=updates)
        words = re.findall(r"recipe\.([a-z_.]+)=([a-z0-9.]+)", said.replace(": ", " "))
        if not words:
            continue
        named += 1
        values: dict[str, Any] = {"name": name}
        for path, value in words:
            group, _, last = path.rpartition(".")
            inner = values.setdefault(group, {}) if group else values
            inner[last] = float(value) if value[0].isdigit() else value
        changed = load_recipe(values)
        check_effect(
            changed, group_size=8, updates_per_batch=updates, max_staleness=4, has_critic=True, single_turn=False
        )
        before, after = bounds_of(recipe), bounds_of(changed)
        assert after.spread(0.01, 500.0) / after.width < before.spread(0.01, 500.0) / before.width, (name, said)
    assert named > 20
