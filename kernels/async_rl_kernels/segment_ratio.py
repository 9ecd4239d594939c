"""From log-ratios to ratios, clip decisions, coefficients and sums for the ESS, in one pass over packed tokens.

For recipes whose coefficient is share * advantage * f(ratio of a unit): REINFORCE with a ratio, PPO (and GSPO,
Turn-PPO), TIS, MIS, CISPO. The trainer's objective (float64, every recipe) does not go through here: at a step's
tens of thousands of tokens it costs nothing. This is for columns of millions of tokens, and its equality with
the objective is tested. Bytes a token: 12 read, 9 written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from async_rl_kernels import reference
from async_rl_kernels.device import uses_triton


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What has one ratio, and what becomes of it. Names and numbers are those of the recipes' settings."""

    level: Literal["token", "turn", "sequence"]
    pool: Literal["mean", "sum"] = "mean"
    """log-ratio of a turn or sequence"""
    rule: Literal["none", "ppo", "truncate", "interval", "cispo"] = "ppo"
    gradient: Literal["unit", "token"] = "unit"
    """none, ppo: differentiate the unit's ratio, or hold it fixed and differentiate each token"""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    """0 is off"""
    cap: float = 8.0
    low: float = 0.5
    high: float = 2.0


class Turns:
    """Where turns and trajectories begin: turn_lengths [turns] in tokens, turns [trajectories] each one's turns."""

    def __init__(
        self, turn_lengths: Sequence[int], turns: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        assert sum(turns) == len(turn_lengths)
        self.turn_lengths, self.turns = tuple(turn_lengths), tuple(turns)
        self.tokens = sum(self.turn_lengths)
        self.of_turn = _offsets(self.turn_lengths).to(device)  # [turns + 1] int64, first token
        self.of_trajectory = _offsets(self.turns).to(device)  # [trajectories + 1] int64, first turn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentRatio:
    ratio: Tensor  # [tokens], of the token's unit
    clipped: Tensor  # [tokens] bool
    coefficient: Tensor  # [tokens]
    turn_sum: Tensor  # [turns], sum of log-ratios
    trajectory_sum: Tensor  # [trajectories]
    turns: Turns

    def turn_ratio(self, pool: Literal["mean", "sum"]) -> Tensor:  # [turns]
        return _ratio(self.turn_sum, self.turns.of_turn.diff(), pool)

    def sequence_ratio(self, pool: Literal["mean", "sum"]) -> Tensor:  # [trajectories]
        return _ratio(self.trajectory_sum, self.turns.of_turn[self.turns.of_trajectory].diff(), pool)

    def log_ess(self) -> Tensor:  # []
        """log (sum w)^2 / sum w^2 of the trajectories that have tokens, w the product of their ratios."""
        weights = self.trajectory_sum[self.turns.of_turn[self.turns.of_trajectory].diff() > 0]
        return 2 * torch.logsumexp(weights, 0) - torch.logsumexp(2 * weights, 0)


@torch.no_grad()
def segment_ratio(log_ratio: Tensor, advantage: Tensor, share: Tensor, turns: Turns, rule: Rule) -> SegmentRatio:
    """log_ratio, advantage, share: [tokens] of one float dtype, all finite.

    Triton for float32 on CUDA, else the definition, reference.segment_ratio.
    """
    assert len(log_ratio) == len(advantage) == len(share) == turns.tokens
    if uses_triton(log_ratio):
        from async_rl_kernels.segment_ratio_triton import segment_ratio_columns

        columns = segment_ratio_columns(log_ratio, advantage, share, turns, rule)
    else:
        columns = reference.segment_ratio(
            log_ratio, advantage, share, turns.turn_lengths, turns.turns, **asdict(rule)
        )
    ratio, clipped, coefficient, turn_sum, trajectory_sum = columns
    return SegmentRatio(
        ratio=ratio, clipped=clipped, coefficient=coefficient, turn_sum=turn_sum, trajectory_sum=trajectory_sum,
        turns=turns,
    )  # fmt: skip


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def _ratio(total: Tensor, lengths: Tensor, pool: str) -> Tensor:
    log = total / lengths.clamp(min=1) if pool == "mean" else total
    return log.clamp(-reference.LARGEST_LOG_RATIO, reference.LARGEST_LOG_RATIO).exp()
