"""Our recipe for long lags, against autograd of its stated surrogate and its ESS written out."""

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
from async_rl.objective.coefficients import coefficients, opob_baselines
from async_rl.objective.library import load_recipe

PULLED = {
    "name": "vcpo_token",
    "kl": {"coefficient": 0.003, "target": "behaviour", "place": "reward"},
    "advantage": {"std_epsilon": 0.1},
}
"""with a pull towards the behaviour policy, as measured in bench/LAB.md"""

Lists = Callable[[Columns], list[list[int]]]


def one_update(columns: Columns) -> Columns:
    """As with one update a batch: the proximal policy is the current one."""
    return replace(columns, log_proximal=columns.log_prob)


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


def shaped_rewards(columns: Columns, owner: list[list[int]], beta: float) -> list[float]:
    """R_i - beta sum_t log(pi_t / mu_t)."""
    moved = columns.log_prob - columns.log_behaviour
    return [float(r) - beta * sum(float(moved[t]) for t in o) for r, o in zip(columns.reward, owner, strict=True)]


def group_stds(columns: Columns, values: list[float]) -> list[float]:
    """Population std of `values` over each trajectory's group; 0 where they are equal."""
    every = torch.tensor(values, dtype=torch.float64)
    found = []
    for g in columns.group_of_trajectory.tolist():
        own = every[columns.group_of_trajectory == g]
        found.append(float(own.std(correction=0)) if len(set(own.tolist())) > 1 else 0.0)
    return found


@pytest.mark.parametrize(("values", "beta", "epsilon"), [({"name": "vcpo_token"}, 0.0, 1e-8), (PULLED, 0.003, 0.1)])
@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_both_columns_are_the_gradients_of_the_surrogate_with_token_weights_up_to_one(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists,
    descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    values: dict[str, Any], beta: float, epsilon: float, seed: int,
) -> None:  # fmt: skip
    columns = one_update(make_columns(seed))
    got, _ = coefficients(columns, load_recipe(values), ObjectiveState())
    owner = tokens_of_trajectory(columns)
    shaped = shaped_rewards(columns, owner, beta)
    unit = [1 / (std + epsilon) if std > 0 else 0.0 for std in group_stds(columns, shaped)]
    reward = [u * r for u, r in zip(unit, shaped, strict=True)]

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


def test_on_fresh_data_groups_of_equal_rewards_are_left_alone(make_columns: Callable[..., Columns]) -> None:
    """Rounding in the log-probs of fresh data must not become an advantage."""
    columns = make_columns(1)
    noise = 1e-7 * torch.randn(len(columns.log_prob), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    behaviour = columns.log_prob + noise
    columns = replace(
        columns, log_behaviour=behaviour, log_proximal=columns.log_prob, reward=torch.ones_like(columns.reward)
    )
    got, _ = coefficients(columns, load_recipe(PULLED), ObjectiveState())
    baselines = opob_baselines(torch.ones_like(columns.reward), columns, load_recipe(PULLED), ObjectiveState())
    assert got.baseline is not None
    group = columns.group_of_trajectory[columns.trajectory_of_turn[columns.turn_of_token]]
    used = got.policy - baselines[group] * got.baseline
    assert float(used.abs().max()) < 1e-5 * float(got.baseline.abs().max())


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_an_answer_far_from_the_policy_that_sampled_it_is_pulled_back(
    make_columns: Callable[..., Columns], direction: float
) -> None:
    """With equal rewards the answer that gained most probability is pushed down, the one that lost most up."""
    columns = make_columns(2, single_turn=True)
    moved = torch.zeros_like(columns.log_prob)
    first = columns.trajectory_of_turn[columns.turn_of_token] == 0
    moved[first] = 0.5 * direction
    columns = replace(
        columns, log_behaviour=columns.log_prob - moved, log_proximal=columns.log_prob,
        reward=torch.ones_like(columns.reward),
    )  # fmt: skip
    recipe = load_recipe(PULLED)
    got, _ = coefficients(columns, recipe, ObjectiveState())
    baselines = opob_baselines(torch.ones_like(columns.reward), columns, recipe, ObjectiveState())
    assert got.baseline is not None
    group = columns.group_of_trajectory[columns.trajectory_of_turn[columns.turn_of_token]]
    used = (got.policy - baselines[group] * got.baseline)[first]
    assert bool((used * direction < 0).all())
