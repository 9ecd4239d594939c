"""Which trajectories are left out before the forward pass, from rewards alone (CPPO, PODS)."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from async_rl.objective.advantage import advantage_of
from async_rl.objective.group_filter import kept_in_groups
from async_rl.objective.recipe import Recipe, Requirements
from async_rl.objective.rewards import shaped_reward
from async_rl.objective.tokens import Columns, tokens_of
from async_rl.objective.trust import select

NOTHING = Requirements(**{f.name: frozenset() if f.name == "noted" else False for f in fields(Requirements)})  # type: ignore[arg-type]
"""what is needed of columns that hold no log-probs"""


@torch.no_grad()
def small_advantages(columns: Columns, recipe: Recipe) -> Tensor:
    """Whether each trajectory is not among those of the largest |advantage| (`select.largest_share`), or not among
    those that its group keeps (`select.keep_in_group`). [I] bool

    columns: of which rewards, lengths and groups count. They are those that `select` rejects in the update.
    """
    tokens = tokens_of(columns, recipe, NOTHING)
    compared = replace(tokens, reward=shaped_reward(tokens, recipe.reward))
    left_out = torch.zeros_like(tokens.finite)
    if recipe.select.keep_in_group > 0:
        left_out = ~kept_in_groups(compared, compared.reward, recipe.select)
        compared = replace(compared, compared=compared.compared & ~left_out)
    if recipe.select.largest_share < 1:
        advantage = advantage_of(compared, recipe, None)
        selection = select(tokens, recipe, advantage.per_token, advantage.zero_signal)
        left_out = left_out | selection.rejected["small_advantage"]
    return left_out
