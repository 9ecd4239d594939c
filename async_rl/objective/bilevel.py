"""Advantages over turns, and from the end of each turn back over its tokens (VAGEN's bi-level GAE).

Formula: docs/algorithms.md#bilevel-gae. Shapes: T policy tokens, U turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.objective.recipe import Recipe
from async_rl.objective.returns import Returns
from async_rl.objective.tokens import Tokens, discounted_suffix_sum, next_in_segment


def bilevel_gae(tokens: Tokens, reward: Tensor, recipe: Recipe) -> Returns:
    """Over turns: delta_k = r_k + g V_{k+1} - V_k, A_k = delta_k + g lambda A_{k+1}, with V_k the value at the turn's
    last token and g `gae.turn_discount`. Over tokens: GAE within the turn with `advantage.discount`, behind whose last
    token comes nothing, and whose last reward is A_k + V_k. `reward` [T]; the critic's target is A + V of each token.

    As the released code has it (the paper's text is of two minds); turns end for the tokens where they end.
    """
    assert tokens.value is not None
    assert tokens.value_before is not None
    value, gae = tokens.value_before, recipe.gae
    last = tokens.turn_length.cumsum(0).long() - 1
    at_end, owner = value[last], tokens.owner_of_turn
    none = torch.zeros_like(at_end)
    delta = tokens.sum_turn(reward) + gae.turn_discount * tokens.recur(_next, at_end, none, owner) - at_end
    trace = torch.full_like(at_end, gae.turn_discount * gae.trace)
    over_turns = tokens.recur(discounted_suffix_sum, delta, trace, owner)
    within = torch.zeros_like(value)
    within[last] = over_turns + at_end
    discount = recipe.advantage.discount
    behind = next_in_segment(value, tokens.turn, last=torch.zeros_like(value))
    steps = within + discount * behind - value
    advantage = discounted_suffix_sum(steps, torch.full_like(value, discount * gae.trace), tokens.turn)
    trained = tokens.finite & ~tokens.columns.truncated if gae.value_finished_only else tokens.finite
    return Returns(
        advantage=advantage, value=tokens.value, target=advantage + value, trained=trained[tokens.trajectory]
    )


def _next(values: Tensor, last: Tensor, segment: Tensor) -> Tensor:
    return next_in_segment(values, segment, last=last)
