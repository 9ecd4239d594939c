"""Turns, or tokens, that are updated one after another, each in a pass of its own: turns with the ratios of those
updated before them as a factor (SeeUPO, arXiv 2602.06554; docs/algorithms.md#ordered-turns), tokens by their
probability (AR-Lopti, arXiv 2505.12929; #ordered-tokens).

Shapes: T policy tokens, U turns with tokens, I trajectories. A turn's place says in which pass it is updated, from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.objective.recipe import Recipe
from async_rl.objective.tokens import Ratio, Tokens, segment_sum, weight_of


def places(tokens: Tokens, order: str) -> Tensor:
    """How many turns of its trajectory come after each (last_first) or before it (first_first). [U] int64"""
    trajectory = tokens.trajectory_of_turn
    ones = torch.ones_like(trajectory)
    number = torch.arange(len(trajectory), device=trajectory.device)
    turns = segment_sum(ones, trajectory, tokens.num_trajectories)
    before = number - (turns.cumsum(0) - turns)[trajectory]
    return before if order == "first_first" else turns[trajectory] - 1 - before


def updated_now(tokens: Tokens, recipe: Recipe, number: int) -> Tensor:
    """1 on the tokens that pass `number` updates, 0 on the others. [T]"""
    if recipe.turn_order != "together":
        now = (places(tokens, recipe.turn_order) == number)[tokens.turn]
    else:
        improbable = tokens.log_behaviour.exp() < recipe.token_order_at
        now = improbable == ((number == 0) == (recipe.token_order == "improbable_first"))
    return now.to(tokens.log_prob.dtype)


def weight_of_updated(tokens: Tokens, ratio: Ratio, order: str, number: int) -> Tensor:
    """Product of the ratios of those turns of the trajectory that earlier passes have updated, its log clamped as that
    of every weight; no gradient. [T]"""
    first = tokens.turn_length.cumsum(0).long() - tokens.turn_length.long()
    done = places(tokens, order) < number
    log = segment_sum(ratio.log[first] * done, tokens.trajectory_of_turn, tokens.num_trajectories)
    return weight_of(log)[tokens.trajectory]
