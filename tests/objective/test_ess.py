"""Effective sample size: vectors, invariance, broken numbers, and the calibrated reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe
from async_rl.objective.measures import ess_ratio


@pytest.mark.parametrize(
    ("weights", "ratio", "scale", "scale_55"),
    [
        ([1.0, 1, 1, 1], 1.0, 1.0, 1.0),
        ([1.0, 2, 0.5, 4], 0.661765, 0.813489, 1.0),
        ([100.0, 0.1, 0.1, 0.1], 0.251501, 0.501499, 0.676221),
        ([math.exp(-30)] * 8, 1.0, 1.0, 1.0),
    ],
)
def test_the_vectors_of_the_specification(weights: list[float], ratio: float, scale: float, scale_55: float) -> None:
    log_weight = torch.tensor(weights, dtype=torch.float64).log()
    assert ess_ratio(log_weight) == pytest.approx(ratio, abs=1e-6)
    for reference, want in ((1.0, scale), (0.55, scale_55)):
        got, _ = coefficients(one_token_each(log_weight), vcpo(reference=reference), ObjectiveState())
        assert got.learning_rate_factors["ess_scale"] == pytest.approx(want, abs=1e-6)
        assert got.metrics["ess/ratio"] == pytest.approx(ratio, abs=1e-6)


def test_a_weight_of_zero_counts_in_the_batch() -> None:
    assert ess_ratio(torch.tensor([0.0, 0.0, 0.0, -2000.0], dtype=torch.float64)) == pytest.approx(0.75)


def vcpo(**ess: Any) -> Any:
    return load_recipe({"name": "vcpo", "opob": {"norm": "length"}, "ess": ess})


def one_token_each(log_weight: torch.Tensor, version: int = 0, current: int = 3) -> Columns:
    n = len(log_weight)
    each = torch.arange(n)
    real = torch.zeros(n, dtype=torch.float64)
    return Columns(
        log_prob=real - 1.0, log_behaviour=real - 1.0 - log_weight, version=torch.full((n,), version),
        turn_of_token=each, trajectory_of_turn=each, group_of_trajectory=each // 4,
        reward=(each % 2).double(), turn_reward=real, state_key=torch.full((n,), -1), truncated=each < 0,
        current_version=current,
    )  # fmt: skip


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    log_weight=st.lists(st.floats(-100, 100), min_size=1, max_size=30),
    factor=st.floats(-600, 600),
)
def test_a_common_factor_does_not_change_it(log_weight: list[float], factor: float) -> None:
    plain = torch.tensor(log_weight, dtype=torch.float64)
    ratio = ess_ratio(plain)
    assert 1 / len(plain) <= ratio <= 1.0
    assert ess_ratio(plain + factor) == pytest.approx(ratio, rel=1e-9)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 1000), broken=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_number_that_is_not_finite_gives_the_smallest_step_and_is_counted(
    make_columns: Callable[..., Columns], seed: int, broken: float
) -> None:
    columns = make_columns(seed)
    recipe = vcpo(reference=1.0)
    log_prob = columns.log_prob.clone()
    log_prob[0] = broken
    got, _ = coefficients(replace(columns, log_prob=log_prob), recipe, ObjectiveState())
    before, _ = coefficients(columns, recipe, ObjectiveState())
    owner = columns.trajectory_of_turn[columns.turn_of_token]
    trajectories = len(owner.unique())
    scale = got.learning_rate_factors["ess_scale"]
    assert scale == pytest.approx((1 / trajectories) ** 0.5)
    assert scale <= before.learning_rate_factors["ess_scale"]
    assert got.metrics["ess/nonfinite"] == 1
    assert torch.isfinite(got.policy).all()
    assert not got.policy[owner == owner[0]].any()


def test_a_reward_that_is_not_finite_says_nothing_about_the_weights(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(4)
    reward = columns.reward.clone()
    reward[0] = math.nan
    got, _ = coefficients(replace(columns, reward=reward), vcpo(reference=1.0), ObjectiveState())
    want, _ = coefficients(columns, vcpo(reference=1.0), ObjectiveState())
    assert got.metrics["ess/ratio"] == want.metrics["ess/ratio"]
    assert got.metrics["ess/nonfinite"] == 0


@pytest.mark.parametrize(("scale", "power"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_the_rule_is_a_power_of_the_ratio(scale: str, power: float) -> None:
    log_weight = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64).log()
    got, _ = coefficients(one_token_each(log_weight), vcpo(scale=scale, reference=1.0), ObjectiveState())
    assert got.learning_rate_factors.get("ess_scale", 1.0) == pytest.approx(0.661765**power, abs=1e-6)


def test_overflow_never_gives_the_full_learning_rate() -> None:
    log_weight = torch.tensor([800.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    got, _ = coefficients(one_token_each(log_weight), vcpo(reference=1.0), ObjectiveState())
    assert got.learning_rate_factors["ess_scale"] == pytest.approx(0.5)


def test_the_calibrated_reference_is_the_ratio_of_fresh_data_of_the_same_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.8 * torch.randn(4000, generator=generator, dtype=torch.float64)
    fresh = one_token_each(noise, version=3)
    got, state = coefficients(fresh, vcpo(reference="calibrated"), ObjectiveState())
    assert got.metrics["ess/reference"] == pytest.approx(math.exp(-0.64), rel=0.1)
    assert got.learning_rate_factors["ess_scale"] == pytest.approx(1.0, abs=0.05)
    # stale data with the same noise is not slowed down; with twice the noise it is
    stale = one_token_each(noise.flip(0), version=1)
    got, after = coefficients(stale, vcpo(reference="calibrated"), state)
    assert got.learning_rate_factors["ess_scale"] == pytest.approx(1.0, abs=0.05)
    assert after.fresh == state.fresh, "stale data must not move the reference"
    worse = one_token_each(2 * noise, version=1)
    got, _ = coefficients(worse, vcpo(reference="calibrated"), state)
    assert got.learning_rate_factors["ess_scale"] < 0.7


def test_before_any_fresh_data_the_reference_is_one() -> None:
    log_weight = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64).log()
    got, state = coefficients(one_token_each(log_weight), vcpo(reference="calibrated"), ObjectiveState())
    assert got.metrics["ess/reference"] == 1.0
    assert sum(m.count for m in state.fresh) == 0


def test_a_length_never_seen_fresh_is_extrapolated_from_the_variance_per_token() -> None:
    noise = 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, state = coefficients(one_token_each(noise, version=3), vcpo(reference="calibrated"), ObjectiveState())
    n = 40
    columns = replace(
        one_token_each(torch.zeros(2, dtype=torch.float64)),
        log_prob=torch.full((2 * n,), -1.0, dtype=torch.float64),
        log_behaviour=torch.full((2 * n,), -1.0, dtype=torch.float64),
        version=torch.zeros(2 * n, dtype=torch.int64),
        turn_of_token=torch.arange(2).repeat_interleave(n),
    )
    got, _ = coefficients(columns, vcpo(reference="calibrated"), state)
    assert got.metrics["ess/reference"] == pytest.approx(math.exp(-0.01 * n), rel=0.04)


def test_the_reference_at_turn_level_uses_turns(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(2)
    recipe = vcpo(level="turn", reference=1.0)
    got, _ = coefficients(columns, recipe, ObjectiveState())
    log_ratio = columns.log_prob - columns.log_behaviour
    turns = columns.turn_of_token.unique()
    log_w = torch.stack([log_ratio[columns.turn_of_token == k].sum() for k in turns])
    w = log_w.exp()
    assert got.metrics["ess/ratio"] == pytest.approx(float(w.sum() ** 2 / (w**2).sum() / len(w)))


def test_no_trajectory_at_all_is_ratio_zero_and_a_skipped_step() -> None:
    got, _ = coefficients(one_token_each(torch.zeros(0, dtype=torch.float64)), vcpo(), ObjectiveState())
    assert got.skip
    assert got.metrics["ess/ratio"] == 0.0
