"""Batches of answers and the coefficients of a recipe on them, for tests that restate published methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe

RAW = {"credit": "trajectory", "baseline": "none", "scale": "none", "whiten": False}
"""the advantage of a token is the reward of its answer"""
SUM = {"mode": "seq_mean_token_sum"}


def policy_of(columns: Columns, name: str, **changes: Any) -> Tensor:
    """The `policy` column [tokens] of recipe `name` with changes."""
    return coefficients(columns, load_recipe({"name": name, **changes}), ObjectiveState())[0].policy


def batch(seed: int, *, groups: int = 3, size: int = 4, spread: float = 0.5, equal: bool = False) -> Columns:
    """Answers of 1 to 7 tokens in groups of `size` with rewards of 0 and 1; with `equal` one group has equal ones."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, groups * size)
    n = int(lengths.sum())
    log_prob = -rng.gamma(1.0, 1.0, n) - 0.01
    reward = rng.integers(0, 2, (groups, size)).astype(float)
    reward[:, 0], reward[:, 1] = 0.0, 1.0
    if equal:
        reward[1] = 1.0
    return Columns(
        log_prob=torch.tensor(log_prob),
        log_behaviour=torch.tensor(np.minimum(log_prob - rng.normal(0.0, spread, n), -1e-3)),
        version=torch.zeros(n, dtype=torch.int64),
        turn_of_token=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        trajectory_of_turn=torch.arange(len(lengths)),
        group_of_trajectory=torch.arange(groups).repeat_interleave(size),
        reward=torch.tensor(reward.reshape(-1)),
        turn_reward=torch.zeros(len(lengths), dtype=torch.float64),
        state_key=torch.full((len(lengths),), -1),
        truncated=torch.tensor(rng.random(len(lengths)) < 0.3),
        current_version=1,
        log_reference=torch.tensor(log_prob - rng.normal(0.0, 0.5, n)),
        value=torch.zeros(n, dtype=torch.float64),
        entropy=torch.tensor(rng.gamma(1.0, 1.0, n)),
    )


def of_answer(columns: Columns) -> list[list[int]]:
    owner = columns.trajectory_of_turn[columns.turn_of_token].tolist()
    return [[t for t, i in enumerate(owner) if i == answer] for answer in range(len(columns.reward))]


def of_group(columns: Columns) -> list[list[int]]:
    group = columns.group_of_trajectory.tolist()
    return [[i for i, g in enumerate(group) if g == number] for number in range(max(group) + 1)]


def answers(ratio: Sequence[float], reward: Sequence[float]) -> Columns:
    """Answers of one token in one group, with these ratios to mu."""
    plain = batch(0, groups=1, size=len(ratio))
    n = len(ratio)
    log_prob = torch.full((n,), -0.7, dtype=torch.float64)
    return replace(
        plain,
        log_prob=log_prob,
        log_behaviour=log_prob - torch.tensor(ratio, dtype=torch.float64).log(),
        reward=torch.tensor(reward, dtype=torch.float64),
        turn_of_token=torch.arange(n),
        version=torch.zeros(n, dtype=torch.int64),
        log_reference=None,
        value=torch.zeros(n, dtype=torch.float64),
        entropy=torch.ones(n, dtype=torch.float64),
    )


def spread(columns: Columns, of_answers: Tensor) -> Tensor:
    """[answers] -> [tokens]"""
    return of_answers[columns.trajectory_of_turn[columns.turn_of_token]]
