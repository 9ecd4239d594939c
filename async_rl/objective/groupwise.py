"""Objectives of a whole group in the place of the policy gradient: log-ratios regressed on rewards, right answers
against wrong ones, log-ratios that tell the one from the other.

Formulas: docs/algorithms.md#regression, #discrimination, #classification. Shapes: T policy tokens, I trajectories, G
groups. Each gives the number that stands for the advantage: what multiplies the gradient of log pi of every token of a
trajectory, before the share of its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.objective.axes import TrustSettings
from async_rl.objective.tokens import Ratio, Tokens, segment_log_sum_exp


def regressed(tokens: Tokens, ratio: Ratio, advantage: Tensor, settings: TrustSettings) -> Tensor:
    """beta (A - beta (l - mean l)) / (n - 1) times the loss's weight, with l the trajectory's log-ratio; absolute:
    beta (A - beta l). ratio: of trajectories, summed. advantage [T] -> [T].

    Means and n are those of the group's trajectories with finite numbers; the others get 0.
    """
    log_ratio = tokens.mean_trajectory(ratio.log)
    target = tokens.mean_trajectory(advantage)
    counted = (tokens.finite & tokens.compared).to(log_ratio.dtype)
    if settings.regression == "group":
        group = tokens.group_of_trajectory
        size = tokens.sum_group(counted)
        mean = tokens.sum_group(log_ratio * counted) / size.clamp(min=1.0)
        log_ratio = log_ratio - mean[group]
        counted = counted * (size > 1)[group] / (size - 1).clamp(min=1.0)[group]
    gap = target - settings.beta * log_ratio
    return (settings.loss_weight * settings.beta * gap * counted)[tokens.trajectory]


def discriminated(tokens: Tokens, ratio: Ratio, settings: TrustSettings) -> Tensor:
    """DisCO: 1 / n+ of right answers, minus a soft maximum over the scores of wrong ones, both divided by the answer's
    length. [T]

    Right is a reward above 0. The score is the mean over the answer of log pi (ratio.level none) or of the token's
    ratio. Groups without both kinds get 0.
    """
    score = tokens.mean_trajectory(tokens.log_prob if ratio.level == "none" else ratio.value)
    group = tokens.group_of_trajectory
    counted = tokens.finite & tokens.compared & (tokens.length > 0)
    right, wrong = counted & (tokens.reward > 0), counted & (tokens.reward <= 0)
    rights, wrongs = tokens.sum_group(right.double()), tokens.sum_group(wrong.double())
    scaled = torch.where(wrong, score / settings.score_temperature, -torch.inf)
    total = segment_log_sum_exp(scaled, group, tokens.num_groups)
    softmax = torch.where(wrong, (scaled - total[group]).exp(), 0.0)
    mixed = (rights > 0) & (wrongs > 0)
    value = torch.where(right, 1 / rights.clamp(min=1.0)[group], -softmax)
    return (torch.where(mixed[group], value, 0.0) / tokens.length.clamp(min=1.0))[tokens.trajectory]


def classified(tokens: Tokens, ratio: Ratio, settings: TrustSettings) -> Tensor:
    """REAL: minus the gradient of log(1 + sum over right e^(-s / tau)) + log(1 + sum over wrong e^(s / tau)), with s
    the mean log-ratio of an answer, divided by its length. ratio: of tokens. [T]

    Right is a reward above 0.
    """
    score = tokens.mean_trajectory(ratio.log) / settings.score_temperature
    group = tokens.group_of_trajectory
    counted = tokens.finite & tokens.compared & (tokens.length > 0)
    right = tokens.reward > 0
    value = torch.zeros_like(score)
    for chosen, sign in ((counted & right, 1.0), (counted & ~right, -1.0)):
        scaled = torch.where(chosen, -sign * score, -torch.inf)
        total = torch.logaddexp(segment_log_sum_exp(scaled, group, tokens.num_groups), torch.zeros_like(score[:1]))
        value = value + sign * torch.where(chosen, (scaled - total[group]).exp(), 0.0)
    return (value / settings.score_temperature / tokens.length.clamp(min=1.0))[tokens.trajectory]
