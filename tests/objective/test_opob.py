"""OPOB: brute-force minimiser, published weights, both estimates, the numbers of docs/algorithms.md#test-vectors."""

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

Lists = Callable[[Columns], list[list[int]]]
PARAMETERS = 7


def scores(columns: Columns, seed: int) -> Tensor:
    """A random grad log pi of every token, [tokens, parameters]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(columns.log_prob), PARAMETERS, generator=generator, dtype=torch.float64)


def trajectory_gradients(column: Tensor, score: Tensor, owner: list[list[int]]) -> Tensor:
    """sum_t column_t grad log pi_t of each trajectory, [trajectories, parameters]."""
    return torch.stack([(column[t].unsqueeze(-1) * score[t]).sum(0) for t in owner])


def per_trajectory_reward(policy: Tensor, baseline: Tensor, owner: list[list[int]]) -> list[float]:
    """The number V_i with policy = V_i * baseline on the trajectory; 0 where the baseline is 0."""
    found = []
    for members in owner:
        ratio = [float(policy[t] / baseline[t]) for t in members if baseline[t] != 0]
        assert max(ratio, default=0.0) - min(ratio, default=0.0) < 1e-9
        found.append(ratio[0] if ratio else 0.0)
    return found


@pytest.mark.parametrize("scope", ["group", "batch"])
@pytest.mark.parametrize("name", ["vcpo", "vcpo_turn", "vcpo_token"])
@settings(max_examples=15, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_exact_baseline_minimises_the_second_moment_of_the_used_estimator(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists, name: str, scope: str, seed: int
) -> None:
    columns = make_columns(seed)
    recipe = load_recipe({"name": name, "opob": {"scope": scope}})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert got.baseline is not None
    owner, score = tokens_of_trajectory(columns), scores(columns, seed)
    gradient = trajectory_gradients(got.baseline, score, owner)
    reward = per_trajectory_reward(got.policy, got.baseline, owner)
    found = opob_baselines(gradient.square().sum(-1), columns, recipe, ObjectiveState())
    group = columns.group_of_trajectory
    for g in range(len(found)):
        members = [i for i in range(len(owner)) if scope == "batch" or int(group[i]) == g]

        def moment(b: float, members: list[int] = members) -> float:
            return sum(float((gradient[i] * (reward[i] - b)).square().sum()) for i in members)

        best, b = moment(float(found[g])), float(found[g])
        slack = 1e-12 * (abs(best) + 1e-30)
        for step in (1e-3, 1e-2, 0.1, 1.0):
            assert moment(b + step) >= best - slack
            assert moment(b - step) >= best - slack


@pytest.mark.parametrize("weight", ["paper", "reference_code"])
@settings(max_examples=15, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_published_weights_are_their_formulas(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists, weight: str, seed: int
) -> None:
    columns = make_columns(seed)
    cap = 1.5
    name = "vcpo_published" if weight == "reference_code" else "vcpo"
    recipe = load_recipe({"name": name, "opob": {"weight": weight}, "trust": {"cap": cap}})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert got.baseline is not None
    owner, score = tokens_of_trajectory(columns), scores(columns, seed)
    gradient = trajectory_gradients(got.baseline, score, owner)
    found = opob_baselines(gradient.square().sum(-1), columns, recipe, ObjectiveState())
    plain = trajectory_gradients(torch.ones_like(columns.log_prob), score, owner).square().sum(-1)
    log_w = torch.stack([(columns.log_prob - columns.log_behaviour)[t].sum() for t in owner])
    big = log_w.exp().square() * plain
    if weight == "reference_code":
        big = big * log_w.exp().clamp(max=cap).square()
    for g in range(len(found)):
        inside = columns.group_of_trajectory == g
        rewards = columns.reward[inside]
        if len(set(rewards.tolist())) > 1 and float(big[inside].sum()) > 0:
            want = (big[inside] * rewards).sum() / big[inside].sum()
            assert float(found[g]) == pytest.approx(float(want), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("norm", ["logit", "length"])
@settings(max_examples=15, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_cheap_norms_put_the_baseline_into_the_policy_column(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists, assert_equal: Callable[..., None],
    norm: str, seed: int,
) -> None:  # fmt: skip
    columns = make_columns(seed)
    exact, _ = coefficients(columns, load_recipe({"name": "vcpo"}), ObjectiveState())
    recipe = load_recipe({"name": "vcpo", "opob": {"norm": norm}})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert got.baseline is None
    assert exact.baseline is not None
    assert columns.prob_square_sum is not None
    energy = torch.ones_like(columns.log_prob)
    if norm == "logit":
        energy = 1 - 2 * columns.log_prob.exp() + columns.prob_square_sum
    owner = tokens_of_trajectory(columns)
    big = torch.stack([(exact.baseline[t].square() * energy[t].clamp(min=0)).sum() for t in owner])
    want = exact.policy.clone()
    for g in range(int(columns.group_of_trajectory[-1]) + 1):
        inside = (columns.group_of_trajectory == g).nonzero().squeeze(-1).tolist()
        mass = float(big[inside].sum())
        b = float((big[inside] * columns.reward[inside]).sum()) / mass if mass else 0.0
        for t in [t for i in inside for t in owner[i]]:
            want[t] -= b * exact.baseline[t]
    torch.testing.assert_close(got.policy, want, rtol=1e-9, atol=1e-12)


def group_of_four(log_w: Tensor) -> Columns:
    """Four trajectories of one token, rewards 1, 0, 1, 0, with these log-weights."""
    four = torch.arange(4)
    real = torch.zeros(4, dtype=torch.float64)
    return Columns(
        log_prob=real - 1.0, log_behaviour=real - 1.0 - log_w, version=four, turn_of_token=four,
        trajectory_of_turn=four, group_of_trajectory=torch.zeros(4, dtype=torch.int64),
        reward=torch.tensor([1.0, 0, 1, 0], dtype=torch.float64), turn_reward=real, state_key=four - 9,
        truncated=four < 0, current_version=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "cap", "want"),
    [("paper", 8.0, 0.037037), ("reference_code", 1.5, 0.010571), ("estimator", 1.5, 0.081633)],
)
def test_the_vector_of_the_specification(weight: str, cap: float, want: float) -> None:
    columns = group_of_four(torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64).log())
    recipe = load_recipe({"name": "vcpo", "opob": {"weight": weight}, "trust": {"cap": cap}})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert got.baseline is not None
    norm_squares = (got.baseline * torch.tensor([1.0, 3.0, 2.0, 1.0])).square()
    assert float(opob_baselines(norm_squares, columns, recipe, ObjectiveState())) == pytest.approx(want, abs=5e-7)


def test_the_baseline_survives_weights_that_underflow() -> None:
    near = group_of_four(torch.tensor([0.0, 0.5, -0.5, 0.2], dtype=torch.float64))
    far = replace(near, log_behaviour=near.log_behaviour + 900.0)
    recipe = load_recipe({"name": "vcpo", "opob": {"weight": "paper"}})
    answers = []
    for columns in (near, far):
        got, _ = coefficients(columns, recipe, ObjectiveState())
        assert got.baseline is not None
        answers.append(float(opob_baselines(got.baseline.square(), columns, recipe, ObjectiveState())))
    assert answers[0] == pytest.approx(answers[1], rel=1e-9)


def test_equal_rewards_and_groups_of_one_get_exactly_no_gradient(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists
) -> None:
    for seed in range(10):
        columns = make_columns(seed)
        recipe = load_recipe({"name": "vcpo"})
        got, _ = coefficients(columns, recipe, ObjectiveState())
        assert got.baseline is not None
        owner = columns.group_of_trajectory[columns.trajectory_of_turn[columns.turn_of_token]]
        quiet = (owner == 1) | (owner == 2)  # conftest: a group of one, and one of equal rewards
        assert not got.policy[quiet].any()
        assert not got.baseline[quiet].any()


def test_one_enormous_gradient_takes_its_own_trajectory_out() -> None:
    columns = group_of_four(torch.zeros(4, dtype=torch.float64))
    recipe = load_recipe({"name": "vcpo"})
    norm_squares = torch.tensor([1e12, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert float(opob_baselines(norm_squares, columns, recipe, ObjectiveState())) == pytest.approx(1.0, abs=1e-9)


def test_no_norm_at_all_is_baseline_zero_and_not_a_number_that_is_none() -> None:
    columns = group_of_four(torch.zeros(4, dtype=torch.float64))
    zero: Any = torch.zeros(4, dtype=torch.float64)
    assert float(opob_baselines(zero, columns, load_recipe({"name": "vcpo"}), ObjectiveState())) == 0.0
