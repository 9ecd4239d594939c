"""KL estimators and their gradients, KL in the reward, adaptive beta, entropy, NLL on positives."""

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
from async_rl.objective.coefficients import coefficients
from async_rl.objective.kl import kl_estimate
from async_rl.objective.library import load_recipe


@pytest.mark.parametrize(
    ("x", "k1", "k2", "k3"),
    [(0.5, 0.5, 0.125, 0.106531), (-0.5, -0.5, 0.125, 0.148721), (2.0, 2.0, 2.0, 1.135335)],
)
def test_the_vectors_of_the_specification(x: float, k1: float, k2: float, k3: float) -> None:
    column = torch.tensor([x], dtype=torch.float64)
    for name, want in (("k1", k1), ("k2", k2), ("k3", k3)):
        assert float(kl_estimate(column, name)[0]) == pytest.approx(want, abs=1e-6)


def published(x: Tensor, estimator: str, gradient: str) -> Tensor:
    if estimator == "k1":
        value = x
    elif estimator == "k2":
        value = 0.5 * x**2
    else:
        bounded = x.clamp(-20, 20)
        value = ((-bounded).exp() + bounded - 1).clamp(-10, 10)
    if gradient == "k2":  # value of the one, gradient of the other
        k2 = 0.5 * x**2
        value = value.detach() + k2 - k2.detach()
    return value


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gradient", ["own", "k2"])
@pytest.mark.parametrize("importance", ["none", "detached", "through"])
@pytest.mark.parametrize("target", ["reference", "behaviour", "proximal"])
@settings(max_examples=4, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), extreme=st.booleans())
def test_the_kl_term_has_the_gradient_of_its_loss(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    estimator: str, gradient: str, importance: str, target: str, seed: int, extreme: bool,
) -> None:  # fmt: skip
    if estimator == "k1" and gradient == "own" and importance != "through":
        return  # refused: no expected gradient
    columns = make_columns(seed, extreme=extreme)
    columns = replace(columns, reward=torch.zeros_like(columns.reward))
    below = {
        "reference": columns.log_reference,
        "behaviour": columns.log_behaviour,
        "proximal": columns.log_proximal,
    }[target]
    assert below is not None

    def loss(log_prob: Tensor) -> Tensor:
        value = published(log_prob - below, estimator, gradient)
        ratio = (log_prob - columns.log_behaviour).clamp(-20, 20).exp()
        if importance == "detached":
            value = ratio.detach().clamp(max=10.0) * value
        elif importance == "through":
            value = ratio * value
        return 0.03 * value.mean()

    kl = {"coefficient": 0.03, "target": target, "estimator": estimator, "gradient": gradient,
          "importance": importance}  # fmt: skip
    recipe = load_recipe({"name": "reinforce_tis", "kl": kl})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert_equal(got.policy, descent(loss, columns))


@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_kl_in_the_reward_is_a_smaller_reward(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Callable[[Columns], list[list[int]]],
    assert_equal: Callable[..., None], seed: int,
) -> None:  # fmt: skip
    columns = make_columns(seed)
    assert columns.log_reference is not None
    at_start = replace(columns, log_proximal=None)
    kl: dict[str, Any] = {"coefficient": 0.1, "place": "reward", "estimator": "k1"}
    got, _ = coefficients(at_start, load_recipe({"name": "dr_grpo", "kl": kl}), ObjectiveState())
    reward = columns.reward.clone()
    for i, members in enumerate(tokens_of_trajectory(columns)):
        reward[i] -= 0.1 * (columns.log_prob - columns.log_reference)[members].sum()
    want, _ = coefficients(replace(at_start, reward=reward), load_recipe({"name": "dr_grpo"}), ObjectiveState())
    torch.testing.assert_close(got.policy, want.policy, rtol=1e-9, atol=1e-12)


def test_beta_adapts_towards_its_target_and_is_remembered(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(1)
    kl = {"coefficient": 0.1, "estimator": "k2", "adaptive_target": 1e-6, "adaptive_horizon": 100.0}
    recipe = load_recipe({"name": "grpo", "kl": kl})
    first, state = coefficients(columns, recipe, ObjectiveState())
    assert first.metrics["kl/coefficient"] == 0.1
    n = len(columns.reward)
    assert state.kl_coefficient == pytest.approx(0.1 * (1 + 0.2 * n / 100))
    second, _ = coefficients(columns, recipe, state)
    assert second.metrics["kl/coefficient"] == state.kl_coefficient


def test_the_entropy_column_is_the_share_times_the_weight(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(1)
    recipe = load_recipe({"name": "reinforce_tis", "entropy": 0.01})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert got.entropy is not None
    torch.testing.assert_close(got.entropy, torch.full_like(got.policy, 0.01 / len(got.policy)))


def test_positive_examples_get_a_likelihood_term(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(1)
    plain, _ = coefficients(columns, load_recipe({"name": "reinforce_tis"}), ObjectiveState())
    recipe = load_recipe({"name": "reinforce_tis", "positive_nll": 0.1})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    good = (columns.reward > 0)[columns.trajectory_of_turn[columns.turn_of_token]]
    torch.testing.assert_close(got.policy - plain.policy, good.double() * 0.1 / good.sum())
