"""Which trajectories have too small an advantage to be trained, from rewards alone (CPPO)."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from async_rl.objective.advantage import advantage_of
from async_rl.objective.recipe import Recipe, Requirements
from async_rl.objective.shaping import shaped_reward
from async_rl.objective.tokens import Columns, tokens_of
from async_rl.objective.trust import select

NOTHING = Requirements(**{f.name: frozenset() if f.name == "noted" else False for f in fields(Requirements)})  # type: ignore[arg-type]
"""what is needed of columns that hold no log-probs"""


@torch.no_grad()
def small_advantages(columns: Columns, recipe: Recipe) -> Tensor:
    """Whether each trajectory is not among those of the largest |advantage| (`select.largest_share`), [I] bool.

    columns: of which rewards, lengths and groups count. They are those that `select` rejects in the update.
    """
    tokens = tokens_of(columns, recipe, NOTHING)
    compared = replace(tokens, reward=shaped_reward(tokens, recipe.reward))
    advantage = advantage_of(compared, recipe, None)
    selection = select(tokens, recipe, advantage.per_token, advantage.zero_signal)
    return selection.rejected["small_advantage"]
