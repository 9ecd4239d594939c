"""BPO restated as its two losses, differentiated by autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from support_methods import batch, of_answer
from torch import Tensor

from async_rl.errors import UserError
from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe

LAMBDA, EPS = 0.95, 0.2


def valued(seed: int) -> Columns:
    columns = batch(seed)
    random = torch.Generator().manual_seed(seed)
    n = len(columns.log_prob)
    value, median = (torch.rand(n, generator=random, dtype=torch.float64) for _ in range(2))
    return replace(columns, value=value, value_before=value, median=median)


def advantages(columns: Columns) -> Tensor:
    """GAE by its recursion, the outcome at the last token. [tokens]"""
    assert columns.value is not None
    found = torch.zeros_like(columns.value)
    for answer, tokens in enumerate(of_answer(columns)):
        after, ahead = 0.0, 0.0
        for t in reversed(tokens):
            reward = float(columns.reward[answer]) if t == tokens[-1] else 0.0
            v = float(columns.value[t])
            after = reward + ahead - v + LAMBDA * after
            found[t], ahead = after, v
    return found


@pytest.mark.parametrize("temperature", [1e-4, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_bpo_pulls_each_ratio_to_the_bounded_optimum_and_the_second_head_to_the_median(
    seed: int, temperature: float
) -> None:
    columns = valued(seed)
    advantage = advantages(columns)
    assert columns.value is not None
    assert columns.median is not None
    q, n = advantage + columns.value, len(advantage)
    target = 1 - EPS + 2 * EPS * torch.sigmoid((q - columns.median) / temperature)
    log_prob = columns.log_prob.clone().requires_grad_()
    ratio = (log_prob - columns.log_behaviour).exp()
    (policy,) = torch.autograd.grad((advantage.abs() * (ratio - target).abs()).mean(), log_prob)
    median = columns.median.clone().requires_grad_()
    (of_median,) = torch.autograd.grad((torch.nn.functional.softplus(q - median) - (q - median) / 2).mean(), median)
    recipe = load_recipe({"name": "bpo", "trust": {"target_temperature": temperature}})
    answer, _ = coefficients(columns, recipe, ObjectiveState())
    torch.testing.assert_close(answer.policy, -policy, rtol=1e-9, atol=1e-13)
    assert answer.value_grad is not None
    assert answer.value_grad.shape == (n, 2)
    torch.testing.assert_close(answer.value_grad[:, 1], of_median, rtol=1e-9, atol=1e-13)
    returns = torch.cat([columns.reward[i].expand(len(tokens)) for i, tokens in enumerate(of_answer(columns))])
    torch.testing.assert_close(answer.value_grad[:, 0], (columns.value - returns) / n, rtol=1e-9, atol=1e-13)


def test_the_loss_of_the_second_head_is_least_near_the_median() -> None:
    """Widely spread returns, so that the logistic kernel is sharp beside them."""
    q = torch.tensor(np.random.default_rng(0).exponential(200.0, 2001))
    u = q.mean().clone().requires_grad_()
    for _ in range(4000):
        (slope,) = torch.autograd.grad((torch.nn.functional.softplus(q - u) - (q - u) / 2).mean(), u)
        u = (u - 100.0 * slope).detach().requires_grad_()
    assert float(u.detach()) == pytest.approx(float(q.median()), rel=0.02)


def test_bpo_needs_a_critic_of_tokens_and_returns_as_they_are(make_columns: Callable[..., Columns]) -> None:
    for changes in ({"credit": "trajectory"}, {"whiten": True}):
        with pytest.raises(UserError, match=r"trust\.rule=bpo compares returns"):
            load_recipe({"name": "bpo", "advantage": changes})
    with pytest.raises(ValueError, match="needs the column median"):
        coefficients(replace(make_columns(0), median=None), load_recipe({"name": "bpo"}), ObjectiveState())
