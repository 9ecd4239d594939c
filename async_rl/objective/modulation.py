"""What an advantage becomes once its sign and its group are known: groups of equal rewards, a bonus for entropy, a
factor for difficulty, for what comes later, for positive tokens.

Formulas: docs/algorithms.md#modulation. Shapes: T policy tokens, I trajectories, G groups; all float64, without a
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.objective.axes import AdvantageSettings
from async_rl.objective.shaping_axes import ShapeSettings
from async_rl.objective.tokens import Ratio, Tokens, discounted_suffix_sum, segment_max


def with_equal_groups(tokens: Tokens, advantage: Tensor, equal: Tensor, settings: AdvantageSettings) -> Tensor:
    """The advantage [T] with that of groups of equal rewards, equal [I] bool, in its place. [T]"""
    right = (tokens.reward > 0)[tokens.trajectory]
    if settings.equal == "sign":
        value = advantage.new_tensor([-settings.equal_weight, settings.equal_weight])[right.long()]
    else:
        assert tokens.entropy is not None
        largest = segment_max(tokens.entropy, tokens.trajectory, tokens.num_trajectories, empty=0.0)[tokens.trajectory]
        value = settings.equal_weight * torch.where(right, tokens.entropy, tokens.entropy - largest)
    chosen = (equal & tokens.finite & tokens.compared)[tokens.trajectory]
    return torch.where(chosen, value, advantage)


def modulated(tokens: Tokens, ratio: Ratio, advantage: Tensor, settings: ShapeSettings) -> Tensor:
    """The advantage [T] with the bonus and factors of `settings`. [T]"""
    result = advantage
    if settings.difficulty > 0:
        result = result * _difficulty(tokens, advantage, settings)
    if settings.entropy_bonus > 0:
        assert tokens.entropy is not None
        bonus = torch.minimum(settings.entropy_bonus * tokens.entropy, advantage.abs() / settings.entropy_bound)
        result = result + bonus
    if settings.future > 0:
        result = result * _future(tokens, ratio, advantage, settings)
    if settings.positive_entropy:
        assert tokens.entropy is not None
        fresh = tokens.of_fresh(tokens.finite)[tokens.trajectory]
        mean = (tokens.entropy * fresh).sum() / fresh.sum().clamp(min=1)
        result = torch.where(fresh & (advantage > 0), result * mean.exp(), result)
    return result


def _difficulty(tokens: Tokens, advantage: Tensor, settings: ShapeSettings) -> Tensor:
    """GRPO-LEAD: w(p) where the advantage [T] is positive, else w(1 - p), w falling from high to low. [T]"""
    counted = tokens.compared.to(advantage.dtype)
    rights = tokens.sum_group(counted * (tokens.reward > 0))
    rate = rights / tokens.sum_group(counted).clamp(min=1.0)

    def weight(share: Tensor) -> Tensor:  # [G] -> [G]
        low, high = settings.difficulty_low, settings.difficulty_high
        return low + (high - low) * torch.sigmoid(-settings.difficulty * (share - settings.difficulty_centre))

    return torch.where(advantage > 0, weight(rate)[tokens.group], weight(1 - rate)[tokens.group])


def _future(tokens: Tokens, ratio: Ratio, advantage: Tensor, settings: ShapeSettings) -> Tensor:
    """FIPO: exp of the discounted sum of the log-ratios from a token on, between 1 and 1 + clip; of negative tokens
    whose ratio has grown beyond `future_safe` between 0.8 and 1. [T]"""
    moved = torch.where(ratio.value <= settings.future_largest, ratio.log, 0.0)
    decay = torch.full_like(moved, 2.0 ** (-1 / settings.future))
    later = tokens.recur(discounted_suffix_sum, moved, decay, tokens.owner_of_token).clamp(-20.0, 20.0).exp()
    factor = later.clamp(1.0, 1.0 + settings.future_clip)
    unsafe = (advantage < 0) & (ratio.value > settings.future_safe)
    return torch.where(unsafe, factor.clamp(0.8, 1.0), factor)
