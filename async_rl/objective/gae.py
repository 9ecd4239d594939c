"""Generalised advantage estimation per token and per turn, and the critic's loss.

`value[t]` is the critic's value of the state before token t was sampled. Columns hold policy tokens
only, so prompt and tool tokens never enter the recursion: the mask-carrying GAE of ALGORITHMS.md 2.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from async_rl.objective.recipe import GaeSettings, Recipe
from async_rl.objective.segment import discounted_suffix_sum, next_in_segment, segment_sum
from async_rl.objective.tokens import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Returns:
    advantage: Tensor  # [tokens]
    target: Tensor  # [tokens], the critic's
    trained: Tensor  # [tokens] bool: where the critic's loss is taken


def token_gae(tokens: Tokens, reward: Tensor, recipe: Recipe) -> Returns:
    """A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t. `reward` [tokens]."""
    assert tokens.value is not None
    advantage, target = _scan(reward, tokens.value, tokens.trajectory, tokens, recipe.gae, recipe.advantage.discount)
    return Returns(advantage=advantage, target=target, trained=_trained(tokens, recipe.gae)[tokens.trajectory])


def turn_gae(tokens: Tokens, reward: Tensor, recipe: Recipe) -> Returns:
    """The same over turns, V of a turn being the value before its first token; every token of a turn
    gets the turn's advantage and the critic is trained on the first (2512.17008). `reward` [tokens]."""
    assert tokens.value is not None
    first = tokens.turn_length.cumsum(0).long() - tokens.turn_length.long()
    advantage, target = _scan(
        tokens.sum_turn(reward), tokens.value[first], tokens.trajectory_of_turn, tokens, recipe.gae,
        recipe.advantage.discount,
    )  # fmt: skip
    trained = torch.zeros_like(tokens.turn, dtype=torch.bool)
    trained[first] = True
    trained &= _trained(tokens, recipe.gae)[tokens.trajectory]
    return Returns(advantage=advantage[tokens.turn], target=target[tokens.turn], trained=trained)


def _scan(
    reward: Tensor, value: Tensor, trajectory: Tensor, tokens: Tokens, settings: GaeSettings, discount: float
) -> tuple[Tensor, Tensor]:
    """Advantage with the policy's trace and target with the critic's, [rows] each."""
    end = torch.zeros_like(value)
    if settings.bootstrap_truncated:  # V after the cut is taken to be V before the last token
        end = torch.where(tokens.columns.truncated[trajectory], value, 0.0)
    delta = reward + discount * next_in_segment(value, trajectory, last=end) - value
    trace = torch.full_like(value, settings.trace)
    if settings.length_adaptive > 0:
        rows = segment_sum(torch.ones_like(value), trajectory, tokens.num_trajectories)
        trace = (1 - 1 / (settings.length_adaptive * rows).clamp(min=1.0))[trajectory]
    advantage = discounted_suffix_sum(delta, discount * trace, trajectory)
    critic_trace = torch.full_like(value, settings.critic_trace)
    target = discounted_suffix_sum(delta, discount * critic_trace, trajectory) + value
    return advantage, target


def _trained(tokens: Tokens, settings: GaeSettings) -> Tensor:
    """Trajectories on which the critic is trained, [trajectories] bool."""
    if settings.value_finished_only:
        return tokens.finite & ~tokens.columns.truncated
    return tokens.finite


def value_loss(tokens: Tokens, returns: Returns, settings: GaeSettings) -> tuple[Tensor, Tensor]:
    """Mean over trained tokens of 1/2 max((V - ret)^2, (V_before + clip(V - V_before) - ret)^2).

    Returns d loss / d V [tokens], and the loss. Where both branches tie the unclipped one counts.
    """
    value, before = tokens.value, tokens.value_before
    assert value is not None
    assert before is not None
    share = returns.trained.to(value.dtype) / returns.trained.sum().clamp(min=1)
    error = value - returns.target
    gradient, square = error, error.square()
    if settings.value_clip > 0:
        step = value - before
        bounded = before + step.clamp(-settings.value_clip, settings.value_clip) - returns.target
        worse = bounded.square() > square
        inside = step.abs() <= settings.value_clip
        gradient = torch.where(worse, bounded * inside, gradient)
        square = torch.maximum(square, bounded.square())
    return gradient * share, 0.5 * (square * share).sum()
