"""How token losses become one number: the share of every token, denominators counted over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.objective.recipe import AggregateSettings
from async_rl.objective.segment import segment_sum
from async_rl.objective.tokens import Tokens


def shares(tokens: Tokens, counted: Tensor, settings: AggregateSettings) -> Tensor:
    """Weight of each token's loss, [tokens]. `counted` [trajectories] bool: those in the denominators.

    Trajectories without policy tokens are in no denominator (ALGORITHMS.md 3.13).
    """
    inside = counted & (tokens.length > 0)
    length = tokens.length.clamp(min=1.0)
    sequences = inside.sum().clamp(min=1).to(length.dtype)
    match settings.mode:
        case "token_mean":
            total = (tokens.length * inside).sum().clamp(min=1.0)
            share = (1 / total).expand(tokens.num_trajectories)
        case "seq_mean_token_mean":
            share = 1 / (sequences * length)
        case "seq_mean_token_sum":
            share = (1 / sequences).expand(tokens.num_trajectories)
        case "constant":
            share = (1 / (sequences * settings.constant)).expand(tokens.num_trajectories)
        case "group_mean_token_mean":
            per_group = tokens.sum_group(tokens.length * inside)
            groups = (per_group > 0).sum().clamp(min=1)
            share = (1 / (groups * per_group.clamp(min=1.0)))[tokens.group_of_trajectory]
        case "turn_mean":
            turns = inside[tokens.trajectory_of_turn].sum().clamp(min=1)
            return (1 / (turns * tokens.turn_length))[tokens.turn]
        case "seq_mean_turn_mean":
            ones = torch.ones_like(tokens.turn_length)
            turns = segment_sum(ones, tokens.trajectory_of_turn, tokens.num_trajectories).clamp(min=1.0)
            per_turn = sequences * turns[tokens.trajectory_of_turn] * tokens.turn_length
            return (1 / per_turn)[tokens.turn]
    return share[tokens.trajectory]
