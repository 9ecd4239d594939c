"""KL to another policy, in the loss or in the reward, and the adaptive weight of it.

x = log pi - log target of the sampled token. k1 = x, k2 = x^2 / 2, k3 = e^-x + x - 1 (clamped as in
verl: x to +-20, k3 to +-10, no gradient beyond). As a loss k1 has zero expected gradient on policy and
k3 a biased one; `gradient: k2` keeps the value shown and takes the gradient of k2 (ALGORITHMS.md 3.12).
"""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from async_rl.objective.ratio import weight_of
from async_rl.objective.recipe import KlSettings, Recipe
from async_rl.objective.state import ObjectiveState
from async_rl.objective.tokens import LARGEST_LOG_RATIO, Tokens

LARGEST_K3 = 10.0
LARGEST_IMPORTANCE = 10.0
"""cap of the detached importance weight of the KL"""


def coefficient_now(recipe: Recipe, state: ObjectiveState) -> float:
    """beta of this step."""
    if recipe.kl.adaptive_target > 0 and state.kl_coefficient is not None:
        return state.kl_coefficient
    return recipe.kl.coefficient


def log_ratio_to_target(tokens: Tokens, settings: KlSettings) -> Tensor:
    """x, [tokens]"""
    match settings.target:
        case "reference":
            assert tokens.log_reference is not None
            return tokens.log_prob - tokens.log_reference
        case "behaviour":
            return tokens.log_prob - tokens.log_behaviour
        case "proximal":
            return tokens.log_prob - tokens.log_proximal


def kl_estimate(x: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Value of the estimator and its derivative with respect to log pi. Two [tokens]."""
    if estimator == "k1":
        return x, torch.ones_like(x)
    if estimator == "k2":
        return 0.5 * x.square(), x
    bounded = x.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    value = (-bounded).exp() + bounded - 1
    moving = (x.abs() <= LARGEST_LOG_RATIO) & (value <= LARGEST_K3)
    return value.clamp(max=LARGEST_K3), torch.where(moving, 1 - (-bounded).exp(), 0.0)


def kl_loss(tokens: Tokens, settings: KlSettings) -> tuple[Tensor, Tensor]:
    """Per-token KL as shown, and d(KL term) / d(log pi), importance weight included. Two [tokens]."""
    x = log_ratio_to_target(tokens, settings)
    value, slope = kl_estimate(x, settings.estimator)
    if settings.gradient == "k2":
        slope = x
    if settings.importance == "none":
        return value, slope
    log_weight = tokens.log_prob - tokens.log_behaviour
    weight = weight_of(log_weight)
    if settings.importance == "detached":
        return value, weight.clamp(max=LARGEST_IMPORTANCE) * slope
    inside = log_weight.abs() <= LARGEST_LOG_RATIO
    return value, weight * slope + weight * inside * value


def kl_penalty(tokens: Tokens, recipe: Recipe, state: ObjectiveState) -> Tensor | None:
    """beta * k1 of each token, to be subtracted from rewards; None when the KL is not there. [tokens]

    Evaluated at the proximal policy (the current one with one update a batch), without gradient.
    """
    if recipe.kl.coefficient == 0 or recipe.kl.place != "reward":
        return None
    x = log_ratio_to_target(replace(tokens, log_prob=tokens.log_proximal), recipe.kl)
    return coefficient_now(recipe, state) * x


def adapted(measured: float, tokens: Tokens, recipe: Recipe, state: ObjectiveState) -> ObjectiveState:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), n trajectories (verl)."""
    settings = recipe.kl
    if settings.coefficient == 0 or settings.adaptive_target <= 0 or not isfinite(measured):
        return state
    error = max(-0.2, min(0.2, measured / settings.adaptive_target - 1))
    beta = coefficient_now(recipe, state)
    beta *= 1 + error * tokens.num_trajectories / settings.adaptive_horizon
    return replace(state, kl_coefficient=beta)
