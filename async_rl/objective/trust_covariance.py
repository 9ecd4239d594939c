"""Clip-Cov and KL-Cov: the few tokens whose log-prob and advantage move together most (entropy collapse)."""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.objective.recipe import TrustSettings
from async_rl.objective.tokens import Tokens


def covariance(tokens: Tokens, advantage: Tensor) -> Tensor:
    """(A - mean A)(log pi - mean log pi), means over the batch's tokens. [tokens]"""
    ok = tokens.finite[tokens.trajectory]
    count = ok.sum().clamp(min=1)
    centred = advantage - (advantage * ok).sum() / count
    return centred * (tokens.log_prob - (tokens.log_prob * ok).sum() / count)


def covariance_choice(tokens: Tokens, advantage: Tensor, candidate: Tensor, settings: TrustSettings) -> Tensor:
    """Clip-Cov: a random covariance_fraction of all tokens, among candidates within the bounds. [tokens] bool

    Random numbers come from a generator seeded with the seed and the version: same batch, same choice.
    """
    cov = covariance(tokens, advantage)
    candidate = candidate & (cov > settings.covariance_low) & (cov < settings.covariance_high)
    candidate = candidate & tokens.finite[tokens.trajectory]
    indices = candidate.nonzero().squeeze(-1)
    generator = torch.Generator().manual_seed((settings.seed << 32) ^ tokens.columns.current_version)
    order = torch.randperm(len(indices), generator=generator).to(indices.device)
    chosen = torch.zeros_like(candidate)
    chosen[indices[order[: _count(tokens, settings.covariance_fraction)]]] = True
    return chosen


def covariance_top(tokens: Tokens, advantage: Tensor, fraction: float) -> Tensor:
    """KL-Cov: the covariance_fraction of all tokens with the largest covariance. [tokens] bool"""
    cov = torch.where(tokens.finite[tokens.trajectory], covariance(tokens, advantage), -torch.inf)
    chosen = torch.zeros_like(cov, dtype=torch.bool)
    number = min(_count(tokens, fraction), len(cov))
    if number:
        chosen[cov.topk(number).indices] = True
    return chosen


def _count(tokens: Tokens, fraction: float) -> int:
    return max(1, int(fraction * float(tokens.length[tokens.finite].sum())))
