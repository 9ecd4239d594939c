"""Clipping bias: what the rule cut away, and kappa in every mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.axes import BiasSettings
from async_rl.objective.coefficients import coefficients, finish
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import Recipe, requirements


def recipe_of(name: str = "so_grpo", **values: Any) -> Recipe:
    return load_recipe({"name": name, **values})


@pytest.mark.parametrize("name", ["s_ppo", "st_ppo"])
@settings(max_examples=25, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), extreme=st.booleans())
def test_used_plus_clipped_is_the_unclipped_policy_gradient(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    name: str, seed: int, extreme: bool,
) -> None:  # fmt: skip
    columns = make_columns(seed, extreme=extreme)
    got, _ = coefficients(columns, recipe_of(name, bias={"estimator": "exact"}), ObjectiveState())
    free = {"rule": "none", "gradient": "unit"}
    plain, _ = coefficients(columns, recipe_of(name, trust=free, bias={"kappa": "none"}), ObjectiveState())
    assert got.clipped is not None
    assert_equal(got.policy + got.clipped, plain.policy)


def four_tokens() -> Columns:
    """r = (1.5, .9, .5, 1.1), A = (1, 1, -1, -1): the first and third are clipped at epsilon .2."""
    each = torch.arange(4)
    ratio = torch.tensor([1.5, 0.9, 0.5, 1.1], dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    return Columns(
        log_prob=zero - 2, log_behaviour=zero - 2 - ratio.log(), version=each, turn_of_token=each,
        trajectory_of_turn=each, group_of_trajectory=torch.zeros_like(each),
        reward=torch.tensor([1.0, 1, -1, -1], dtype=torch.float64), turn_reward=zero, state_key=each - 9,
        truncated=each < 0, current_version=4, prob_square_sum=zero + 0.5,
    )  # fmt: skip


RAW = {"baseline": "none", "scale": "none"}


def test_the_vector_of_the_specification() -> None:
    recipe = recipe_of("so_grpo", ratio={"level": "token"}, advantage=RAW, bias={"kappa": "relative"})
    got, _ = coefficients(four_tokens(), recipe, ObjectiveState())
    assert got.metrics["clip/bias"] == pytest.approx(0.5)
    assert got.metrics["clip/frac"] == pytest.approx(0.5)
    assert got.learning_rate_factors["kappa"] == pytest.approx(0.5)


def test_relative_kappa_is_one_if_and_only_if_nothing_is_clipped() -> None:
    columns = four_tokens()
    mild = replace(columns, log_behaviour=columns.log_prob - 0.3 * (columns.log_prob - columns.log_behaviour))
    for estimator in ("scalar", "logit"):
        bias = {"kappa": "relative", "estimator": estimator}
        recipe = recipe_of("so_grpo", ratio={"level": "token"}, advantage=RAW, bias=bias)
        quiet, _ = coefficients(mild, recipe, ObjectiveState())
        loud, _ = coefficients(columns, recipe, ObjectiveState())
        # 0.5 ** 0.3 = 0.81 and 1.5 ** 0.3 = 1.13: nothing is clipped
        assert quiet.learning_rate_factors["kappa"] == 1.0
        assert loud.learning_rate_factors["kappa"] < 1.0


def test_everything_clipped_is_kappa_zero_and_a_skipped_step() -> None:
    columns = four_tokens()
    columns = replace(columns, log_behaviour=columns.log_prob - 3 * columns.reward)
    recipe = recipe_of("so_grpo", ratio={"level": "token"}, advantage=RAW, bias={"kappa": "relative"})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert got.learning_rate_factors["kappa"] == 0.0
    assert "clipped" in got.skip


def exact(kappa: str, **more: Any) -> Recipe:
    return recipe_of("so_grpo", bias={"kappa": kappa, "estimator": "exact", **more})


def test_guarded_kappa_compares_with_its_running_size_and_never_exceeds_one() -> None:
    recipe, state = exact("guarded", decay=0.5), ObjectiveState()
    sizes, kappas = [0.0, 2.0, 4.0, 1.0], []
    for size in sizes:
        factors, state, _ = finish(recipe, state, gradient_norm=1.0, clipped_norm=size)
        kappas.append(factors["kappa"])
    assert kappas == pytest.approx([1.0, 1.0, 0.5, 1.0])
    assert state.bias_size == pytest.approx(0.5 * (0.5 * 2.0 + 0.5 * 4.0) + 0.5 * 1.0)


@pytest.mark.parametrize("kappa", ["guarded", "relative", "literal"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_stops_the_step_and_is_not_remembered(kappa: str, broken: float) -> None:
    state = ObjectiveState(bias_size=1.0)
    factors, after, _ = finish(exact(kappa), state, gradient_norm=1.0, clipped_norm=broken)
    assert factors["kappa"] == 0.0
    assert after == state


def test_the_other_modes_by_their_formulas() -> None:
    state = ObjectiveState()
    assert finish(exact("literal"), state, gradient_norm=1.0, clipped_norm=4.0)[0]["kappa"] == pytest.approx(0.25)
    assert finish(exact("literal"), state, gradient_norm=1.0, clipped_norm=0.0)[0]["kappa"] == 1.0
    relative = exact("relative", strength=2.0)
    assert finish(relative, state, gradient_norm=3.0, clipped_norm=1.0)[0]["kappa"] == pytest.approx(0.6)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_per_trajectory_kappa_shrinks_each_trajectory_by_its_own_bias(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Callable[[Columns], list[list[int]]],
    assert_equal: Callable[..., None], seed: int,
) -> None:  # fmt: skip
    columns = make_columns(seed)
    level = {"level": "token"}
    plain, _ = coefficients(columns, recipe_of("so_grpo", ratio=level, bias={"kappa": "none"}), ObjectiveState())
    recipe = recipe_of("so_grpo", ratio=level, bias={"kappa": "per_trajectory", "strength": 0.7})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    unclipped = recipe_of("so_grpo", ratio=level, bias={"kappa": "none"}, trust={"rule": "none"})
    full, _ = coefficients(columns, unclipped, ObjectiveState())
    want = plain.policy.clone()
    for members in tokens_of_trajectory(columns):
        used = plain.policy[members].abs().sum()
        cut = (full.policy - plain.policy)[members].abs().sum()
        if cut > 0:
            want[members] *= used / (used + 0.7 * cut)
    assert_equal(got.policy, want)
    assert "kappa" not in got.learning_rate_factors


def test_the_exact_estimator_asks_for_the_clipped_column() -> None:
    assert requirements(exact("relative")).clipping_bias_norm
    got, _ = coefficients(four_tokens(), exact("relative"), ObjectiveState())
    assert got.clipped is not None
    assert "kappa" not in got.learning_rate_factors
    assert BiasSettings().kappa == "none"
