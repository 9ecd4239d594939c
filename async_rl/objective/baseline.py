"""OPOB, the off-policy optimal baseline (VCPO): sum W R / sum W with W the squared gradient norms.

It minimises the second moment of the estimator sum_i g_i (R_i - b) when W_i = |g_i|^2 with g_i the
gradient of trajectory i exactly as it enters the step (weight "estimator"). Weights live in log space, so
that neither underflow nor overflow of importance weights changes the result (ALGORITHMS.md 1.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from async_rl.objective.ratio import behaviour_log_ratio
from async_rl.objective.recipe import Recipe
from async_rl.objective.segment import segment_log_sum_exp, segment_max, segment_sum
from async_rl.objective.tokens import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Opob:
    """The gradient is sum_i g_i (values_i - b units_i); the baseline is in units of values / units."""

    values: Tensor  # [trajectories]
    units: Tensor  # [trajectories], 0 where nothing is subtracted


def optimal_baseline(log_weight: Tensor, opob: Opob, tokens: Tokens, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """[trajectories] log W -> baseline of each group, and the largest share of W in it. Two [groups].

    With scope batch all groups have the same. 0 where no trajectory has weight.
    """
    group = tokens.group_of_trajectory
    num = tokens.num_groups
    if recipe.opob.scope == "batch":
        group, num = torch.zeros_like(group), 1
    alive = opob.units > 0
    log_weight = torch.where(alive & ~torch.isnan(log_weight), log_weight, -torch.inf)
    target = torch.where(alive, opob.values / opob.units.clamp(min=torch.finfo(opob.units.dtype).tiny), 0.0)
    total = segment_log_sum_exp(log_weight, group, num)
    share = torch.where(torch.isfinite(log_weight), (log_weight - total[group]).exp(), 0.0)
    baseline = segment_sum(share * target, group, num)
    largest = segment_max(share, group, num, empty=0.0)
    if recipe.opob.scope == "batch":
        return baseline.expand(tokens.num_groups), largest.expand(tokens.num_groups)
    return baseline, largest


def log_opob_weight(
    log_norm_square: Tensor, column: Tensor, trust_weight: Tensor, tokens: Tokens, recipe: Recipe
) -> Tensor:
    """log W of each trajectory from the log squared gradient norm of its `baseline` column.

    log_norm_square: [trajectories], log |sum_t column_t grad log pi_t|^2
    column: [tokens], the baseline column; paper and reference_code need it constant in a trajectory
    trust_weight: [tokens], the weight kappa inside the column
    """
    if recipe.opob.weight == "estimator":
        return log_norm_square
    log_column = tokens.mean_trajectory(column.abs()).log()
    log_ratio = tokens.sum_trajectory(behaviour_log_ratio(tokens))
    log_weight = 2 * log_ratio + log_norm_square - 2 * log_column
    if recipe.opob.weight == "reference_code":
        log_weight = log_weight + 2 * tokens.mean_trajectory(trust_weight).log()
    return log_weight


def proxy_log_norm_square(column: Tensor, tokens: Tokens, norm: str) -> Tensor:
    """log of sum_t column_t^2 energy_t, the cheap estimate of a trajectory's squared gradient norm.

    energy: 1 (length) or 1 - 2 pi + sum_v pi_v^2, the squared norm of d log pi / d logits (logit).
    [tokens] -> [trajectories]; -inf where it is 0.
    """
    return tokens.sum_trajectory(column.square() * energy(tokens, norm)).log()


def energy(tokens: Tokens, norm: str) -> Tensor:
    """Squared gradient norm of log pi_t at the logits, or 1. [tokens]"""
    if norm == "length":
        return torch.ones_like(tokens.log_prob)
    assert tokens.prob_square_sum is not None
    return (1 - 2 * tokens.log_prob.exp() + tokens.prob_square_sum).clamp(min=0.0)
