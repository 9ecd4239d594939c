"""Our recipe for long lags, against autograd of its stated surrogate and its ESS written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe

Lists = Callable[[Columns], list[list[int]]]


def surrogate(columns: Columns, owner: list[list[int]], value: list[float]) -> Callable[[Tensor], Tensor]:
    """-(1/B) sum_i (1/L_i) sum_t sg(min(pi_t / mu_t, 1)) value_i log pi_t."""
    counted = [members for members in owner if members]

    def loss(log_prob: Tensor) -> Tensor:
        total = log_prob.sum() * 0
        for members, v in zip(owner, value, strict=True):
            for t in members:
                weight = (log_prob[t] - columns.log_behaviour[t]).detach().exp().clamp(max=1.0)
                total = total - weight * v * log_prob[t] / len(members)
        return total / max(1, len(counted))

    return loss


def group_stds(columns: Columns) -> list[float]:
    """Population std of the rewards of each trajectory's group; 0 where they are equal."""
    found = []
    for g in columns.group_of_trajectory.tolist():
        rewards = columns.reward[columns.group_of_trajectory == g]
        found.append(float(rewards.std(correction=0)) if len(set(rewards.tolist())) > 1 else 0.0)
    return found


@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_both_columns_are_the_gradients_of_the_surrogate_with_token_weights_up_to_one(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists,
    descent: Callable[..., Tensor], assert_equal: Callable[..., None], seed: int,
) -> None:  # fmt: skip
    columns = make_columns(seed)
    got, _ = coefficients(columns, load_recipe({"name": "vcpo_token"}), ObjectiveState())
    owner, stds = tokens_of_trajectory(columns), group_stds(columns)
    unit = [1 / (std + 1e-8) if std > 0 else 0.0 for std in stds]
    reward = [u * float(r) for u, r in zip(unit, columns.reward, strict=True)]

    assert got.baseline is not None
    assert_equal(got.baseline, descent(surrogate(columns, owner, unit), columns))
    assert_equal(got.policy, descent(surrogate(columns, owner, reward), columns))


def test_no_token_weighs_more_than_on_fresh_data(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(3)
    recipe = load_recipe({"name": "vcpo_token"})
    stale, _ = coefficients(columns, recipe, ObjectiveState())
    plain = load_recipe({"name": "vcpo_token", "ratio": {"level": "none"}, "trust": {"rule": "none"}})
    fresh, _ = coefficients(columns, plain, ObjectiveState())
    assert stale.baseline is not None
    assert fresh.baseline is not None
    assert bool((stale.baseline.abs() <= fresh.baseline.abs() * (1 + 1e-12)).all())
    assert bool((stale.baseline.abs() < fresh.baseline.abs() * 0.99).any())


@pytest.mark.parametrize("seed", range(5))
def test_the_learning_rate_follows_the_effective_share_of_tokens(
    make_columns: Callable[..., Columns], seed: int
) -> None:
    columns = make_columns(seed)
    recipe = load_recipe({"name": "vcpo_token", "ess": {"reference": 1.0}})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    weight = (columns.log_prob - columns.log_behaviour).exp()
    share = weight.sum().square() / weight.square().sum() / len(weight)
    assert got.learning_rate_factors["ess_scale"] == pytest.approx(float(share.sqrt()), rel=1e-9)
    assert torch.isfinite(got.policy).all()
