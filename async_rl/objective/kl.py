"""KL to another policy, in the loss or in the reward (docs/algorithms.md#kl). Shapes: T policy tokens; float64.

x = log pi - log target of the sampled token: k1 = x, k2 = x^2 / 2, k3 = e^-x + x - 1 (clamped as in verl: x to +-20, k3
to +-10, no gradient beyond). As a loss k1 has zero expected gradient on policy and k3 a biased one; `gradient: k2`
keeps the value shown and takes the gradient of k2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from async_rl.objective.axes import KlSettings
from async_rl.objective.gates import quantile
from async_rl.objective.recipe import Recipe, moving_numbers
from async_rl.objective.shaping import certain
from async_rl.objective.state import ObjectiveState
from async_rl.objective.tokens import LARGEST_LOG_RATIO, Tokens, weight_of

LARGEST_K3 = 10.0
"""clamp of the k3 estimate, as in verl"""
LARGEST_IMPORTANCE = 10.0
"""cap of the detached importance weight of the KL"""


def kl_now(recipe: Recipe, state: ObjectiveState) -> Iterator[tuple[int, KlSettings, float]]:
    """The KL terms of this step: number (0: `recipe.kl`, the only one that adapts), settings, beta."""
    moving = "kl.coefficient" in moving_numbers(recipe)  # one that has come to 0 is measured on
    for number, kl in enumerate((recipe.kl, *recipe.more_kl)):
        if kl.coefficient != 0 or (number == 0 and moving):
            yield number, kl, coefficient_now(recipe, state) if number == 0 else kl.coefficient


def coefficient_now(recipe: Recipe, state: ObjectiveState) -> float:
    """beta, the KL's coefficient in this step."""
    if recipe.kl.adaptive_target > 0 and state.kl_coefficient is not None:
        return state.kl_coefficient
    return recipe.kl.coefficient


def log_ratio_to_target(tokens: Tokens, settings: KlSettings) -> Tensor:
    """x of every token, [T]."""
    match settings.target:
        case "reference":
            assert tokens.log_reference is not None
            return tokens.log_prob - tokens.log_reference
        case "behaviour":
            return tokens.log_prob - tokens.log_behaviour
        case "proximal":
            return tokens.log_prob - tokens.log_proximal
        case "proxy":
            assert tokens.columns.log_proxy is not None
            return tokens.log_prob - tokens.columns.log_proxy.double()


def kl_estimate(x: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Value of the estimator and its derivative with respect to log pi: [T] -> two [T]."""
    if estimator == "k1":
        return x, torch.ones_like(x)
    if estimator == "k2":
        return 0.5 * x.square(), x
    if estimator == "forward":
        ratio = weight_of(x)
        moving = x.abs() <= LARGEST_LOG_RATIO
        return ratio - 1 - x.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO), torch.where(moving, ratio - 1, 0.0)
    if estimator == "chi2":
        ratio = weight_of(x)
        return (ratio - 1).square(), torch.where(x.abs() <= LARGEST_LOG_RATIO, 2 * (ratio - 1) * ratio, 0.0)
    bounded = x.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    value = (-bounded).exp() + bounded - 1
    moving = (x.abs() <= LARGEST_LOG_RATIO) & (value <= LARGEST_K3)
    return value.clamp(max=LARGEST_K3), torch.where(moving, 1 - (-bounded).exp(), 0.0)


def protected(tokens: Tokens, x: Tensor, advantage: Tensor, settings: KlSettings) -> Tensor:
    """Tokens of negative advantage that are among the batch's least likely, and likelier under the target (Lp-Reg).

    x, advantage [T] -> [T] bool.
    """
    counted = tokens.finite[tokens.trajectory]
    if not bool(counted.any()):
        return counted
    bound = quantile(tokens.log_prob[counted], settings.protected_share)
    return counted & (advantage < 0) & (tokens.log_prob <= bound) & (x < 0)


def kl_loss(tokens: Tokens, settings: KlSettings, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token KL as shown, and d(KL term) / d(log pi), importance weight included. advantage [T] -> two [T]."""
    x = log_ratio_to_target(tokens, settings)
    chosen: Tensor | None = None
    if settings.tokens == "protected":
        chosen = protected(tokens, x, advantage, settings)
        x = torch.where(chosen, x, 0.0)
    value, slope = kl_estimate(x, settings.estimator)
    if settings.gradient == "k2":
        slope = x
    if settings.recent > 0:
        near, moved = kl_estimate(tokens.log_prob - tokens.log_proximal, settings.estimator)
        value = value + settings.recent * (near - value)
        slope = slope + settings.recent * (moved - slope)
    if settings.largest_slope > 0:
        slope = slope.clamp(max=settings.largest_slope)
    if settings.certain_share < 1:
        held = certain(tokens, settings.certain_share)
        value, slope = torch.where(held, value, 0.0), torch.where(held, slope, 0.0)
    if chosen is not None:
        value, slope = torch.where(chosen, value, 0.0), torch.where(chosen, slope, 0.0)
    if settings.importance == "none":
        return value, slope
    log_weight = tokens.log_prob - tokens.log_behaviour
    weight = weight_of(log_weight)
    if settings.importance == "detached":
        return value, weight.clamp(max=LARGEST_IMPORTANCE) * slope
    inside = log_weight.abs() <= LARGEST_LOG_RATIO
    return value, weight * slope + weight * inside * value


def kl_penalty(tokens: Tokens, recipe: Recipe, state: ObjectiveState) -> Tensor | None:
    """beta * k1 of each token, [T], to be subtracted from rewards; None when no KL is in the reward.

    Without gradient; evaluated at the proximal policy, or with `taken_at=update` at the current one.
    """
    total: Tensor | None = None
    for _, kl, beta in kl_now(recipe, state):
        if kl.place != "reward":
            continue
        taken = tokens if kl.taken_at == "update" else replace(tokens, log_prob=tokens.log_proximal)
        penalty = beta * log_ratio_to_target(taken, kl)
        total = penalty if total is None else total + penalty
    return total


def adapted(measured: float, tokens: Tokens, recipe: Recipe, state: ObjectiveState) -> ObjectiveState:
    """The state with beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), n trajectories (verl)."""
    settings = recipe.kl
    if settings.coefficient == 0 or settings.adaptive_target <= 0 or not isfinite(measured):
        return state
    error = max(-0.2, min(0.2, measured / settings.adaptive_target - 1))
    beta = coefficient_now(recipe, state)
    beta *= 1 + error * tokens.num_trajectories / settings.adaptive_horizon
    return replace(state, kl_coefficient=beta)
