"""Importance ratios: which policies, pooled over what, and where their gradient goes."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from async_rl.objective.recipe import Level, Pool, RatioSettings
from async_rl.objective.tokens import LARGEST_LOG_RATIO, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """The ratio of every token's unit (itself, its turn, its trajectory)."""

    log: Tensor  # [tokens], not clamped
    value: Tensor  # [tokens], exp of the clamped log
    level: Level | str
    pool: Pool

    @property
    def inside(self) -> Tensor:  # [tokens] bool
        """where the clamp leaves a gradient"""
        return self.log.abs() <= LARGEST_LOG_RATIO

    def pull_back(self, per_token: Tensor, tokens: Tokens) -> Tensor:
        """d(sum_t per_token_t * log ratio_t) / d(log pi_s), [tokens] -> [tokens].

        With the mean every token of a unit receives the unit's mean: the turn-mean advantage of
        ST-PPO (ALGORITHMS.md 2.2)."""
        if self.level == "none":
            return torch.zeros_like(per_token)
        if self.level == "token":
            return per_token
        if self.level == "turn":
            total, length, unit = tokens.sum_turn(per_token), tokens.turn_length, tokens.turn
        else:
            total, length, unit = tokens.sum_trajectory(per_token), tokens.length, tokens.trajectory
        return (total / length.clamp(min=1.0) if self.pool == "mean" else total)[unit]


def pooled(log_ratio: Tensor, tokens: Tokens, level: Level | str, pool: Pool) -> Tensor:
    """Log-ratio of each token's unit, [tokens] -> [tokens]."""
    if level == "none":
        return torch.zeros_like(log_ratio)
    if level == "token":
        return log_ratio
    if level == "turn":
        total, length, unit = tokens.sum_turn(log_ratio), tokens.turn_length, tokens.turn
    else:
        total, length, unit = tokens.sum_trajectory(log_ratio), tokens.length, tokens.trajectory
    return (total / length.clamp(min=1.0) if pool == "mean" else total)[unit]


def weight_of(log_ratio: Tensor) -> Tensor:
    """exp with the clamp of ALGORITHMS.md section 0."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def ratio_of(tokens: Tokens, settings: RatioSettings) -> Ratio:
    """The recipe's ratio of the current policy to its denominator."""
    log_ratio = tokens.log_prob - log_denominator(tokens, settings)
    unit_log = pooled(log_ratio, tokens, settings.level, settings.pool)
    return Ratio(log=unit_log, value=weight_of(unit_log), level=settings.level, pool=settings.pool)


def log_denominator(tokens: Tokens, settings: RatioSettings) -> Tensor:
    """Log-prob of each token under the policy below the ratio, [tokens]."""
    match settings.denominator:
        case "behaviour":
            return tokens.log_behaviour
        case "proximal":
            return tokens.log_proximal
        case "proximal_loglinear":
            return log_linear_proximal(tokens)
        case "mixture":
            share = settings.mixture_weight
            return torch.logaddexp(tokens.log_behaviour + log(1 - share), tokens.log_prob + log(share))
        case "reference":
            assert tokens.log_reference is not None
            return tokens.log_reference


def log_linear_proximal(tokens: Tokens) -> Tensor:
    """The proximal policy without a forward pass, from token versions (AReaL; ALGORITHMS.md 3.2).

    With the proximal version one below the current one: log mu + a (log pi - log mu),
    a = clip((v_prox - v) / (v_now - v), 0, 1), and 0 for tokens of the current version. [tokens]
    """
    version = tokens.columns.version
    now = tokens.columns.current_version
    age = (now - version).double()
    share = ((now - 1 - version).double() / age.clamp(min=1.0)).clamp(0.0, 1.0)
    share = torch.where((age > 0) & (version >= 0), share, 0.0)
    return tokens.log_behaviour + share * (tokens.log_prob - tokens.log_behaviour)


def behaviour_log_ratio(tokens: Tokens) -> Tensor:
    """log pi_theta - log mu of every token: staleness and engine mismatch together. [tokens]"""
    return tokens.log_prob - tokens.log_behaviour
