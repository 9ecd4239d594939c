"""What is done to advantages after rewards were compared: factors and masks.

Formulas: docs/algorithms.md#advantage-shaping, #masks. Shapes: T policy tokens, U turns,
I trajectories. Factors are positive numbers and masks are 0 or 1, so neither changes what a trust rule decides; both
multiply the share of a token, and so stand in the column of an exact baseline too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.objective.axes import TeachingSettings
from async_rl.objective.gates import most_entropy, quantile
from async_rl.objective.shaping_axes import BandSettings, MaskSettings, ShapeSettings
from async_rl.objective.tokens import Tokens, discounted_suffix_sum
from async_rl.objective.trust import bernoulli_kl


def shaped_advantage(tokens: Tokens, advantage: Tensor, settings: ShapeSettings) -> Tensor:
    """EMPG's addition: the advantage [T] with the bonus for a clear next turn, centred over the batch's turns.

    It replaces the product that `factor` would give: the bonus is added behind it.
    """
    kept = tokens.finite[tokens.trajectory_of_turn]
    entropy = turn_entropy(tokens, kept)
    follows = torch.zeros_like(kept)
    follows[:-1] = tokens.trajectory_of_turn[1:] == tokens.trajectory_of_turn[:-1]
    bonus = torch.zeros_like(entropy)
    decay = settings.turn_entropy or 1.0
    bonus[:-1] = torch.where(follows[:-1], settings.clarity * (-decay * entropy[1:]).exp(), 0.0)
    scaled = advantage * factor(tokens, settings)
    per_turn = tokens.sum_turn(scaled) / tokens.turn_length + bonus
    mean = (per_turn * kept).sum() / kept.sum().clamp(min=1)
    return torch.where(kept[tokens.turn], scaled + (bonus - mean)[tokens.turn], 0.0)


def taught(tokens: Tokens, advantage: Tensor, settings: TeachingSettings) -> Tensor:
    """The advantage [T] with coefficient (log q - log pi) added, or that alone: minus the gradient of the reverse KL to
    the teacher, token by token. 0 where there is no teacher. [T]"""
    assert tokens.columns.log_teacher is not None
    log_teacher = tokens.columns.log_teacher.double()
    gap = torch.where(torch.isfinite(log_teacher), log_teacher - tokens.log_prob, 0.0)
    if settings.largest > 0:
        gap = gap.clamp(-settings.largest, settings.largest)
    if settings.discount > 0:
        decay = torch.full_like(gap, settings.discount)
        gap = tokens.recur(discounted_suffix_sum, gap, decay, tokens.owner_of_token)
    gap = torch.where(tokens.finite[tokens.trajectory], settings.coefficient * gap, 0.0)
    return gap if settings.alone else advantage + gap


def distance(entropy: Tensor, past: float, band: BandSettings) -> Tensor:
    """How far each entropy is above (positive) or below the band around the past mean. [T] -> [T]"""
    above = (entropy - band.high * past).clamp(min=0.0)
    return above - (band.low * past - entropy).clamp(min=0.0)


def factor(tokens: Tokens, settings: ShapeSettings) -> Tensor:
    """What each token's advantage is multiplied with, [T]."""
    result = torch.ones_like(tokens.log_prob)
    if settings.probability > 0:
        result = result * (1 - settings.probability + settings.probability * tokens.log_prob.exp())
    if settings.focal > 0:
        result = result * (-torch.expm1(tokens.log_prob.clamp(max=0.0))).pow(settings.focal)
    if settings.turn_entropy > 0:
        kept = tokens.finite[tokens.trajectory_of_turn]
        weight = (-settings.turn_entropy * turn_entropy(tokens, kept)).exp()
        mean = (weight * kept).sum() / kept.sum().clamp(min=1)
        result = result * (weight / mean)[tokens.turn]
    return result


def turn_entropy(tokens: Tokens, counted: Tensor) -> Tensor:
    """Mean entropy of each turn, scaled so that those of the counted turns span 0 to 1. counted [U] bool -> [U]"""
    assert tokens.entropy is not None
    entropy = tokens.sum_turn(tokens.entropy) / tokens.turn_length
    if not bool(counted.any()):
        return torch.zeros_like(entropy)
    low, high = entropy[counted].min(), entropy[counted].max()
    spread = torch.where(high > low, high - low, torch.ones_like(high))
    return ((entropy - low) / spread).clamp(0.0, 1.0)


def mask(tokens: Tokens, advantage: Tensor, settings: MaskSettings) -> Tensor:
    """1 where a token is trained, else 0, [T]. advantage [T]."""
    counted = tokens.finite[tokens.trajectory]
    trained = torch.ones_like(counted)
    if settings.entropy_share < 1:
        assert tokens.entropy is not None
        if settings.entropy_scope == "batch":
            trained &= _top(tokens.entropy, counted, settings.entropy_share)
        else:
            trained &= most_entropy(tokens, settings.entropy_share)
    if settings.turn_entropy_share < 1:
        assert tokens.entropy is not None
        mean = tokens.sum_turn(tokens.entropy) / tokens.turn_length
        trained &= _top(mean, tokens.finite[tokens.trajectory_of_turn], settings.turn_entropy_share)[tokens.turn]
    if settings.probability_below < 1:
        trained &= tokens.log_prob.exp() <= settings.probability_below
    if settings.binary_kl > 0:
        there = bernoulli_kl(tokens.log_proximal, tokens.log_behaviour)
        back = bernoulli_kl(tokens.log_behaviour, tokens.log_proximal)
        trained &= (there <= settings.binary_kl) & (back <= settings.binary_kl)
    if settings.advantage_sigma > 0 and bool(counted.any()):
        known = advantage[counted]
        trained &= (advantage - known.mean()).abs() <= settings.advantage_sigma * known.std(correction=0)
    return trained.to(advantage.dtype)


def _top(values: Tensor, counted: Tensor, share: float) -> Tensor:
    """Whether a row is among the `share` of the counted ones with the highest values: [n], [n] bool -> [n] bool.

    Those that equal the quantile are in."""
    if not bool(counted.any()):
        return counted
    return values >= quantile(values[counted], 1 - share)


def certain(tokens: Tokens, share: float) -> Tensor:
    """The `share` of each trajectory's tokens, rounded down, with the lowest entropy. [T] bool"""
    return ~most_entropy(tokens, 1 - share)
