"""Critic-free advantages against plain loops over trajectories and turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from async_rl.objective import Columns
from async_rl.objective.advantage import advantage_of, group_advantage
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import Recipe, requirements
from async_rl.objective.tokens import Tokens, tokens_of

Lists = Callable[[Columns], list[list[int]]]


def prepared(columns: Columns, name: str, **advantage: Any) -> tuple[Tokens, Recipe]:
    recipe = load_recipe({"name": name, "advantage": advantage})
    return tokens_of(columns, recipe, requirements(recipe)), recipe


def per_group(columns: Columns, rule: Callable[[list[float], list[int]], list[float]], lengths: list[int]) -> Tensor:
    """Apply `rule(rewards, lengths)` to each group. [trajectories]"""
    groups: dict[int, list[int]] = {}
    for i, g in enumerate(columns.group_of_trajectory.tolist()):
        groups.setdefault(g, []).append(i)
    answer = torch.zeros_like(columns.reward)
    for members in groups.values():
        found = rule([float(columns.reward[i]) for i in members], [lengths[i] for i in members])
        answer[members] = torch.tensor(found, dtype=answer.dtype)
    return answer


def grpo(r: list[float], _: list[int]) -> list[float]:
    if len(set(r)) == 1:
        return [0.0] * len(r)
    return [(x - statistics.fmean(r)) / (statistics.stdev(r) + 1e-6) for x in r]


def dr_grpo(r: list[float], _: list[int]) -> list[float]:
    return [x - statistics.fmean(r) for x in r] if len(set(r)) > 1 else [0.0] * len(r)


def rloo(r: list[float], _: list[int]) -> list[float]:
    if len(r) == 1:
        return [0.0]
    return [x - (sum(r) - x) / (len(r) - 1) if len(set(r)) > 1 else 0.0 for x in r]


def opo(r: list[float], lengths: list[int]) -> list[float]:
    if len(set(r)) == 1:
        return [0.0] * len(r)
    mass = sum(lengths)
    mean = sum(n * x for n, x in zip(lengths, r, strict=True)) / mass if mass else statistics.fmean(r)
    return [x - mean for x in r]


def max_rl(r: list[float], _: list[int]) -> list[float]:
    mean = statistics.fmean(r)
    return [(x - mean) / mean if mean > 0 and len(set(r)) > 1 else 0.0 for x in r]


def ngrpo(r: list[float], _: list[int]) -> list[float]:
    more = [*r, 1.0]
    return [(x - statistics.fmean(more)) / (statistics.stdev(more) + 1e-6) for x in r]


@pytest.mark.parametrize(
    ("name", "rule"),
    [("grpo", grpo), ("dr_grpo", dr_grpo), ("rloo", rloo), ("opo", opo), ("max_rl", max_rl), ("ngrpo", ngrpo)],
)
@settings(max_examples=25, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_group_advantages_are_their_formulas(
    make_columns: Callable[..., Columns],
    tokens_of_trajectory: Lists,
    name: str,
    rule: Callable[[list[float], list[int]], list[float]],
    seed: int,
) -> None:
    columns = make_columns(seed)
    tokens, recipe = prepared(columns, name)
    lengths = [len(t) for t in tokens_of_trajectory(columns)]
    got = group_advantage(tokens, tokens.reward, recipe.advantage)
    torch.testing.assert_close(got, per_group(columns, rule, lengths), rtol=1e-9, atol=1e-12)


def test_equal_rewards_give_exactly_zero_though_their_mean_is_not_exact(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(3)
    columns = replace(columns, reward=torch.full_like(columns.reward, 0.1))
    for name in ("grpo", "dr_grpo", "rloo", "opo", "max_rl", "reinforce_pp_baseline"):
        tokens, recipe = prepared(columns, name)
        assert not group_advantage(tokens, tokens.reward, recipe.advantage).any(), name


def test_a_reward_that_is_not_finite_is_not_compared_with(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(4)
    group = columns.group_of_trajectory
    bad = int((group == 0).nonzero()[0])
    broken = columns.reward.clone()
    broken[bad] = torch.nan
    tokens, recipe = prepared(replace(columns, reward=broken), "dr_grpo")
    got = group_advantage(tokens, tokens.reward, recipe.advantage)
    others = [i for i in (group == 0).nonzero().squeeze(-1).tolist() if i != bad]
    mean = columns.reward[others].mean()
    assert got[bad] == 0
    if len(others) > 1:
        torch.testing.assert_close(got[others], columns.reward[others] - mean)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), discount=st.sampled_from([0.0, 0.9, 1.0]))
def test_turn_returns_are_discounted_and_compared_within_the_group(
    make_columns: Callable[..., Columns], tokens_of_turn: Lists, seed: int, discount: float
) -> None:
    columns = make_columns(seed, empty=False)
    tokens, recipe = prepared(columns, "turn_return", discount=discount, scale="none")
    got = advantage_of(tokens, recipe, None).per_token
    returns = turn_returns_by_loop(columns, discount)
    groups = columns.group_of_trajectory[columns.trajectory_of_turn].tolist()
    for turn, members in enumerate(tokens_of_turn(columns)):
        peers = [returns[k] for k in range(len(returns)) if groups[k] == groups[turn]]
        want = returns[turn] - statistics.fmean(peers) if len(set(peers)) > 1 else 0.0
        for token in members:
            assert float(got[token]) == pytest.approx(want, rel=1e-9, abs=1e-12)


def turn_returns_by_loop(columns: Columns, discount: float) -> list[float]:
    owner = columns.trajectory_of_turn.tolist()
    returns = [0.0] * len(owner)
    for turn in reversed(range(len(owner))):
        last = turn + 1 == len(owner) or owner[turn + 1] != owner[turn]
        ahead = float(columns.reward[owner[turn]]) if last else discount * returns[turn + 1]
        returns[turn] = float(columns.turn_reward[turn]) + ahead
    return returns


def normalised(values: list[float], peers: list[float]) -> list[float]:
    if len(set(peers)) <= 1:
        return [0.0] * len(values)
    return [(x - statistics.fmean(peers)) / (statistics.stdev(peers) + 1e-6) for x in values]


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_turn_group_advantage_compares_the_same_turn_and_adds_the_outcome(
    make_columns: Callable[..., Columns], tokens_of_turn: Lists, tokens_of_trajectory: Lists, seed: int
) -> None:
    columns = make_columns(seed, empty=False)
    tokens, recipe = prepared(columns, "turn_grpo", outcome_weight=0.7, turn_weight=0.5)
    got = advantage_of(tokens, recipe, None).per_token
    lengths = [len(t) for t in tokens_of_trajectory(columns)]
    outcome = per_group(columns, grpo, lengths)
    owner = columns.trajectory_of_turn.tolist()
    number = [owner[:k].count(owner[k]) for k in range(len(owner))]
    group = columns.group_of_trajectory[columns.trajectory_of_turn].tolist()
    for turn, members in enumerate(tokens_of_turn(columns)):
        peers = [k for k in range(len(owner)) if (group[k], number[k]) == (group[turn], number[turn])]
        rewards = [float(columns.turn_reward[k]) for k in peers]
        (own,) = normalised([float(columns.turn_reward[turn])], rewards)
        for token in members:
            want = 0.5 * own + 0.7 * float(outcome[owner[turn]])
            assert float(got[token]) == pytest.approx(want, rel=1e-9, abs=1e-12)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_gigpo_compares_turns_that_began_in_the_same_state(
    make_columns: Callable[..., Columns], tokens_of_turn: Lists, tokens_of_trajectory: Lists, seed: int
) -> None:
    columns = make_columns(seed, empty=False)
    tokens, recipe = prepared(columns, "gigpo")
    got = advantage_of(tokens, recipe, None).per_token
    owner = columns.trajectory_of_turn.tolist()
    state = columns.state_key.tolist()
    group = columns.group_of_trajectory[columns.trajectory_of_turn].tolist()
    returns = turn_returns_by_loop(columns, 0.95)
    episodes = columns.reward.clone()
    episodes.index_add_(0, columns.trajectory_of_turn, columns.turn_reward)
    lengths = [len(t) for t in tokens_of_trajectory(columns)]
    outcome = per_group(replace(columns, reward=episodes), grpo, lengths)
    for turn, members in enumerate(tokens_of_turn(columns)):
        peers = [k for k in range(len(owner)) if (group[k], state[k]) == (group[turn], state[turn])]
        step = 0.0
        if state[turn] >= 0:
            (step,) = normalised([returns[turn]], [returns[k] for k in peers])
        for token in members:
            want = step + float(outcome[owner[turn]])
            assert float(got[token]) == pytest.approx(want, rel=1e-9, abs=1e-12)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), discount=st.sampled_from([0.0, 0.97, 1.0]))
def test_reinforce_pp_whitens_the_return_to_go(
    make_columns: Callable[..., Columns], tokens_of_trajectory: Lists, seed: int, discount: float
) -> None:
    columns = make_columns(seed)
    columns = replace(columns, turn_reward=torch.zeros_like(columns.turn_reward))
    tokens, recipe = prepared(columns, "reinforce_pp", discount=discount)
    got = advantage_of(tokens, recipe, None).per_token
    returns = torch.zeros_like(columns.log_prob)
    for trajectory, members in enumerate(tokens_of_trajectory(columns)):
        for place, token in enumerate(members):
            steps = len(members) - 1 - place
            returns[token] = float(columns.reward[trajectory]) * (discount**steps)
    want = (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_rewards_of_empty_turns_go_to_the_token_before_them(make_columns: Callable[..., Columns]) -> None:
    for seed in range(20):
        columns = make_columns(seed)
        tokens, _ = prepared(columns, "grpo")
        wanted = torch.zeros_like(columns.reward).index_add_(0, columns.trajectory_of_turn, columns.turn_reward)
        has_tokens = tokens.length > 0
        torch.testing.assert_close(tokens.sum_trajectory(tokens.token_reward), wanted * has_tokens)


def test_batch_std_divides_by_the_spread_of_all_rewards(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(5)
    tokens, recipe = prepared(columns, "grpo", scale="batch_std", baseline="none")
    got = group_advantage(tokens, tokens.reward, recipe.advantage)
    torch.testing.assert_close(got, columns.reward / (columns.reward.std() + 1e-6))
