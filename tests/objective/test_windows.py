"""Episodes in pieces (T-PPO): EGAE and its coefficients against the loop and the published loss, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_methods import batch, of_answer
from torch import Tensor

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.objective.returns import token_gae
from async_rl.objective.tokens import tokens_of

LAM = 0.95


def pieces(seed: int, cut: Tensor) -> Columns:
    columns = batch(seed)
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(len(columns.log_prob), generator=generator, dtype=torch.float64)
    reward = torch.where(cut, 0.0, columns.reward)  # what is cut has none
    return replace(columns, cut=cut, reward=reward, value=value, value_before=value)


def egae(reward: float, value: list[float], *, cut: bool, lam: float) -> list[float]:
    """The paper's sum, delta by delta: behind a cut the value is that of the last state (gamma 1)."""
    last = len(value) - 1
    found = []
    for t in range(last + 1):
        total = 0.0
        for later in range(t, last + 1):
            ahead = value[later + 1] if later < last else (value[last] if cut else 0.0)
            got = reward if later == last and not cut else 0.0
            total += lam ** (later - t) * (got + ahead - value[later])
        found.append(total)
    return found


@pytest.mark.parametrize(
    ("cut", "reward", "wanted"),
    [(True, 0.0, (0.29, 0.2, 0.0)), (False, 0.0, (-0.16125, -0.275, -0.5)), (False, 1.0, (0.74125, 0.675, 0.5))],
)
def test_the_published_numbers(cut: bool, reward: float, wanted: tuple[float, ...]) -> None:
    value = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    rows = torch.zeros(3, dtype=torch.int64)
    columns = Columns(
        log_prob=value - 2,
        log_behaviour=value - 2,
        version=rows,
        turn_of_token=rows,
        trajectory_of_turn=rows[:1],
        group_of_trajectory=rows[:1],
        reward=torch.tensor([reward], dtype=torch.float64),
        turn_reward=torch.zeros(1, dtype=torch.float64),
        state_key=rows[:1] - 1,
        truncated=torch.tensor([False]),
        current_version=0,
        value=value,
        value_before=value,
        cut=torch.tensor([cut]),
    )
    recipe = load_recipe({"name": "t_ppo"})
    tokens = tokens_of(columns, recipe, requirements(recipe))
    at_the_end = torch.tensor([0.0, 0.0, reward], dtype=torch.float64)
    found = token_gae(tokens, at_the_end, recipe)
    torch.testing.assert_close(found.advantage, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found.trained.tolist() == [not cut] * 3
    assert egae(reward, value.tolist(), cut=cut, lam=LAM) == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_coefficients_are_the_gradient_of_the_published_loss(seed: int, data: st.DataObject) -> None:
    many = 12
    cut = torch.tensor(data.draw(st.lists(st.booleans(), min_size=many, max_size=many)))
    columns = pieces(seed, cut)
    assert columns.value is not None
    answer = coefficients(columns, load_recipe({"name": "t_ppo"}), ObjectiveState())[0]
    advantage, wanted, trained = torch.zeros_like(columns.log_prob), torch.zeros_like(columns.log_prob), []
    for number, members in enumerate(of_answer(columns)):
        reward, is_cut = float(columns.reward[number]), bool(cut[number])
        values = columns.value[members].tolist()
        advantage[members] = torch.tensor(egae(reward, values, cut=is_cut, lam=LAM), dtype=torch.float64)
        wanted[members] = reward  # Monte Carlo
        trained += [] if is_cut else members
    advantage = (advantage - advantage.mean()) / (advantage.var() + 1e-8).sqrt()
    log_prob = columns.log_prob.clone().requires_grad_()
    ratio = (log_prob - columns.log_behaviour).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    (gradient,) = torch.autograd.grad(surrogate.mean(), log_prob)
    torch.testing.assert_close(answer.policy, gradient, rtol=0, atol=1e-9)
    # the critic: half the squared error to the return, over the tokens of episodes that are over
    value = columns.value.clone().requires_grad_()
    if trained:
        (of_value,) = torch.autograd.grad(0.5 * (value - wanted)[trained].square().mean(), value)
    else:
        of_value = torch.zeros_like(value)
    assert answer.value_grad is not None
    torch.testing.assert_close(answer.value_grad, of_value, rtol=0, atol=1e-9)


def test_the_mean_reward_is_that_of_episodes_that_are_over() -> None:
    columns = pieces(3, torch.tensor([True, False] * 6))
    metrics = coefficients(columns, load_recipe({"name": "t_ppo"}), ObjectiveState())[0].metrics
    assert metrics["reward/mean"] == pytest.approx(float(columns.reward[1::2].mean()))
    assert metrics["window/cut"] == 0.5
    columns = pieces(3, torch.ones(12, dtype=torch.bool))
    assert "reward/mean" not in coefficients(columns, load_recipe({"name": "t_ppo"}), ObjectiveState())[0].metrics
