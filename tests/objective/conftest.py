"""Random columns for the objective's tests, and autograd as the judge."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rl.objective import Columns


def _make_columns(
    seed: int,
    *,
    spread: float = 0.4,
    extreme: bool = False,
    groups: int = 4,
    single_turn: bool = False,
    one_token_turns: bool = False,
    empty: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Columns:
    """Ragged turns (empty ones too), trajectories without tokens, equal rewards, a group of one.

    spread: std of the log-ratio of a token. extreme: a few log-ratios of +-80.
    """
    rng = np.random.default_rng(seed)
    group_of_trajectory: list[int] = []
    trajectory_of_turn: list[int] = []
    turn_of_token: list[int] = []
    reward: list[float] = []
    for group in range(groups):
        size = 1 if group == 1 else int(rng.integers(2, 6))
        equal = group == 2
        for _ in range(size):
            trajectory = len(group_of_trajectory)
            group_of_trajectory.append(group)
            reward.append(1.0 if equal else float(rng.normal()))
            turns = 1 if single_turn else int(rng.integers(0 if empty else 1, 5))
            for _ in range(turns):
                length = 1 if one_token_turns else int(rng.integers(0 if empty else 1, 7))
                turn_of_token += [len(trajectory_of_turn)] * length
                trajectory_of_turn.append(trajectory)
    n = len(turn_of_token)
    log_prob = -rng.gamma(1.0, 1.0, n) - 0.01
    log_ratio = rng.normal(0.0, spread, n)
    if extreme and n:
        where = rng.random(n) < 0.15
        log_ratio[where] = rng.choice([-80.0, 80.0], where.sum())
    version = rng.integers(3, 8, n)

    def real(values: object) -> Tensor:
        return torch.tensor(np.asarray(values, dtype=np.float64)).to(dtype)

    return Columns(
        log_prob=real(log_prob),
        log_behaviour=real(log_prob - log_ratio),
        version=torch.tensor(version, dtype=torch.int64),
        turn_of_token=torch.tensor(turn_of_token, dtype=torch.int64),
        trajectory_of_turn=torch.tensor(trajectory_of_turn, dtype=torch.int64),
        group_of_trajectory=torch.tensor(group_of_trajectory, dtype=torch.int64),
        reward=real(reward),
        turn_reward=real(rng.normal(size=len(trajectory_of_turn))),
        state_key=torch.tensor(rng.integers(-1, 3, len(trajectory_of_turn)), dtype=torch.int64),
        truncated=torch.tensor(rng.random(len(reward)) < 0.3),
        current_version=7,
        log_proximal=real(log_prob - 0.3 * rng.normal(0.0, spread, n)),
        log_reference=real(log_prob - rng.normal(0.0, 0.5, n)),
        value=real(rng.normal(size=n)),
        entropy=real(rng.gamma(1.0, 1.0, n)),
        prob_square_sum=real(rng.uniform(0.3, 1.0, n)),
        log_teacher=real(log_prob + rng.normal(0.0, 0.5, n)),
        log_proxy=real(log_prob + rng.uniform(0.0, 0.3, n)),
        median=real(rng.normal(size=n)),
        turn_values=real(rng.normal(size=(n, 4))),
        turn_values_slow=real(rng.normal(size=(n, 4))),
    )


@pytest.fixture(scope="session")
def make_columns() -> Callable[..., Columns]:
    return _make_columns


@pytest.fixture(scope="session")
def descent() -> Callable[[Callable[[Tensor], Tensor], Columns], Tensor]:
    """-d loss / d log_prob by autograd: what the coefficients of a surrogate must be. [tokens]"""

    def judge(loss: Callable[[Tensor], Tensor], columns: Columns) -> Tensor:
        log_prob = columns.log_prob.clone().requires_grad_()
        value = loss(log_prob)
        if not value.requires_grad:
            return torch.zeros_like(columns.log_prob)
        (gradient,) = torch.autograd.grad(value, log_prob, allow_unused=True)
        return torch.zeros_like(log_prob) if gradient is None else -gradient

    return judge


@pytest.fixture(scope="session")
def assert_equal() -> Callable[[Tensor, Tensor], None]:
    """Equal to a relative error of 1e-9, element by element; a zero must be a zero of the same scale."""

    def check(got: Tensor, wanted: Tensor) -> None:
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13 * largest)

    return check


def _tokens_of_trajectory(columns: Columns) -> list[list[int]]:
    owner = columns.trajectory_of_turn[columns.turn_of_token].tolist()
    found: list[list[int]] = [[] for _ in range(len(columns.reward))]
    for token, trajectory in enumerate(owner):
        found[trajectory].append(token)
    return found


def _tokens_of_turn(columns: Columns) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(len(columns.trajectory_of_turn))]
    for token, turn in enumerate(columns.turn_of_token.tolist()):
        found[turn].append(token)
    return found


@pytest.fixture(scope="session")
def tokens_of_trajectory() -> Callable[[Columns], list[list[int]]]:
    return _tokens_of_trajectory


@pytest.fixture(scope="session")
def tokens_of_turn() -> Callable[[Columns], list[list[int]]]:
    return _tokens_of_turn
