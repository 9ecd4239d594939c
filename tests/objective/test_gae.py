"""GAE and the value loss against the recursions as published, and autograd."""

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
from async_rl.objective.advantage import advantage_of
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.objective.returns import Returns
from async_rl.objective.tokens import tokens_of

Lists = Callable[[Columns], list[list[int]]]


def returns_of(columns: Columns, values: dict[str, Any]) -> Returns:
    recipe = load_recipe(values)
    tokens = tokens_of(columns, recipe, requirements(recipe))
    returns = advantage_of(tokens, recipe, None).returns
    assert returns is not None
    return returns


def recursion(
    rewards: list[float], values: list[float], gamma: float, lam: float, last: float
) -> tuple[list[float], list[float]]:
    """The scan from the end, as written in the papers."""
    advantage, ahead, value_ahead = [0.0] * len(values), 0.0, last
    for t in reversed(range(len(values))):
        delta = rewards[t] + gamma * value_ahead - values[t]
        ahead = delta + gamma * lam * ahead
        advantage[t], value_ahead = ahead, values[t]
    return advantage, [a + v for a, v in zip(advantage, values, strict=True)]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    bootstrap=st.booleans(),
    alpha=st.sampled_from([0.0, 0.3]),
)
def test_token_gae_is_the_recursion_over_policy_tokens(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists, tokens_of_turn: Lists,
    seed: int, gamma: float, lam: float, bootstrap: bool, alpha: float,
) -> None:  # fmt: skip
    columns = make_columns(seed, empty=False)
    gae = {"trace": lam, "critic_trace": 0.5, "bootstrap_truncated": bootstrap, "length_adaptive": alpha}
    values = {"name": "ppo", "advantage": {"whiten": False, "discount": gamma}, "gae": gae}
    got = returns_of(columns, values)
    assert columns.value is not None
    reward = torch.zeros_like(columns.value)
    for turn, members in enumerate(tokens_of_turn(columns)):
        reward[members[-1]] += columns.turn_reward[turn]
    for trajectory, members in enumerate(tokens_of_trajectory(columns)):
        reward[members[-1]] += columns.reward[trajectory]
        v = columns.value[members].tolist()
        last = v[-1] if bootstrap and bool(columns.truncated[trajectory]) else 0.0
        trace = 1 - 1 / max(1.0, alpha * len(v)) if alpha else lam
        advantage, _ = recursion(reward[members].tolist(), v, gamma, trace, last)
        _, target = recursion(reward[members].tolist(), v, gamma, 0.5, last)
        torch.testing.assert_close(got.advantage[members], torch.tensor(advantage, dtype=torch.float64))
        torch.testing.assert_close(got.target[members], torch.tensor(target, dtype=torch.float64))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.9, 1.0]), lam=st.sampled_from([0.0, 0.9]))
def test_turn_gae_is_the_recursion_over_turns_and_trains_their_first_tokens(
    make_columns: Callable[..., Columns], tokens_of_turn: Lists, seed: int, gamma: float, lam: float
) -> None:
    columns = make_columns(seed, empty=False)
    gae = {"trace": lam, "critic_trace": lam}
    values = {"name": "turn_gae_ppo", "advantage": {"whiten": False, "discount": gamma}, "gae": gae}
    got = returns_of(columns, values)
    assert columns.value is not None
    turns = tokens_of_turn(columns)
    first = torch.zeros_like(got.trained)
    for trajectory in range(len(columns.reward)):
        mine = (columns.trajectory_of_turn == trajectory).nonzero().squeeze(-1).tolist()
        rewards = columns.turn_reward[mine].tolist()
        rewards[-1] += float(columns.reward[trajectory])
        v = [float(columns.value[turns[k][0]]) for k in mine]
        advantage, target = recursion(rewards, v, gamma, lam, 0.0)
        for k, a, ret in zip(mine, advantage, target, strict=True):
            first[turns[k][0]] = True
            assert got.advantage[turns[k]].tolist() == pytest.approx([a] * len(turns[k]))
            assert float(got.target[turns[k][0]]) == pytest.approx(ret)
    assert torch.equal(got.trained, first)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), clip=st.sampled_from([0.0, 0.3]), finished=st.booleans())
def test_value_grad_is_the_gradient_of_the_clipped_value_loss(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists, assert_equal: Callable[..., None],
    seed: int, clip: float, finished: bool,
) -> None:  # fmt: skip
    columns = make_columns(seed)
    assert columns.value is not None
    before = columns.value + 0.4 * torch.randn(len(columns.value), generator=torch.Generator().manual_seed(seed))
    columns = replace(columns, value_before=before.double())
    values: dict[str, Any] = {"name": "ppo", "gae": {"value_clip": clip, "value_finished_only": finished}}
    returns = returns_of(columns, values)
    trained = torch.ones_like(returns.trained)
    if finished:
        for trajectory, members in enumerate(tokens_of_trajectory(columns)):
            trained[members] = not bool(columns.truncated[trajectory])
    assert columns.value is not None
    value = columns.value.clone().requires_grad_()
    old = columns.value_before
    assert old is not None
    square = (value - returns.target).square()
    if clip:
        bounded = old + (value - old).clamp(-clip, clip)
        square = torch.maximum(square, (bounded - returns.target).square())
    if trained.any():
        (0.5 * square[trained].mean()).backward()
    got, _ = coefficients(columns, load_recipe(values), ObjectiveState())
    assert got.value_grad is not None
    assert_equal(got.value_grad, torch.zeros_like(old) if value.grad is None else value.grad)


def test_a_broken_value_reaches_neither_the_policy_nor_the_critic(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(6)
    assert columns.value is not None
    value: Tensor = columns.value.clone()
    value[0] = torch.inf
    got, _ = coefficients(replace(columns, value=value), load_recipe({"name": "ppo"}), ObjectiveState())
    assert got.value_grad is not None
    assert torch.isfinite(got.policy).all()
    assert torch.isfinite(got.value_grad).all()
    assert got.policy[0] == 0
    assert got.value_grad[0] == 0
