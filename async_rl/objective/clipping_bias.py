"""ST-PPO's clipping-bias correction: kappa, from the size of the gradient that the trust rule cut away.

The exact normaliser of the paper is not confirmed (ALGORITHMS.md 2.4): the modes are readings of
"normalises gradients by down-weighting unreliable, highly off-policy samples". All but `literal` only
ever shrink the step; kappa is a factor of the learning rate, because Adam and gradient clipping would
undo a factor of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from async_rl.objective.baseline import energy
from async_rl.objective.recipe import BiasSettings
from async_rl.objective.state import ObjectiveState
from async_rl.objective.tokens import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasSize:
    """Mean |weight * A| over the batch's kept tokens: cut away, used, and before the rule."""

    cut: Tensor  # []
    used: Tensor  # []
    full: Tensor  # []


def scalar_size(tokens: Tokens, keep: Tensor, full: Tensor, used: Tensor, advantage: Tensor) -> BiasSize:
    """The free estimate (ALGORITHMS.md 2.4 B). `keep` [trajectories] bool, the rest [tokens]."""
    ok = keep[tokens.trajectory].to(full.dtype)
    count = ok.sum().clamp(min=1.0)
    return BiasSize(
        cut=(((full - used) * advantage).abs() * ok).sum() / count,
        used=((used * advantage).abs() * ok).sum() / count,
        full=((full * advantage).abs() * ok).sum() / count,
    )


def logit_size(tokens: Tokens, column: Tensor) -> Tensor:
    """sqrt(sum_t column_t^2 energy_t): the norm at the logits of sum_t column_t grad log pi_t. []"""
    return (column.square() * energy(tokens, "logit")).sum().sqrt()


def kappa_of(cut: float, used: float, settings: BiasSettings, state: ObjectiveState) -> tuple[float, ObjectiveState]:
    """Learning-rate factor from the sizes of the cut and the used gradient, and the new running size.

    1 when nothing was cut; 0 when a size is not finite, so that a broken batch never speeds learning up.
    """
    if settings.kappa in ("none", "per_trajectory"):
        return 1.0, state
    if not (isfinite(cut) and isfinite(used)):
        return 0.0, state
    if cut == 0.0:
        return 1.0, state
    if settings.kappa == "relative":
        return used / (used + settings.strength * cut), state
    if settings.kappa == "literal":
        return 1 / (cut + settings.floor), state
    size = cut if state.bias_size is None else state.bias_size
    kappa = min(1.0, size / max(cut, settings.floor))
    running = settings.decay * size + (1 - settings.decay) * cut
    return kappa, replace(state, bias_size=running)


def kappa_per_trajectory(
    tokens: Tokens, full: Tensor, used: Tensor, advantage: Tensor, settings: BiasSettings
) -> Tensor:
    """used / (used + strength * cut) of each trajectory, 1 where nothing is cut. [trajectories]"""
    weight = torch.ones_like(full)
    if settings.estimator == "logit":
        weight = energy(tokens, "logit").sqrt()
    cut = tokens.sum_trajectory(((full - used) * advantage).abs() * weight)
    kept = tokens.sum_trajectory((used * advantage).abs() * weight)
    return torch.where(cut > 0, kept / (kept + settings.strength * cut), torch.ones_like(cut))
