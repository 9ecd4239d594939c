"""With a critic: advantages per token and per turn, what the critic is trained towards, and its loss.

Formulas: docs/algorithms.md#gae, #turn-gae, #turn-q, #value-loss. Shapes: T policy tokens, U turns, I trajectories; all
float64. A critic has one output a token, the value of the state before it, or with Q heads four (`HEADS`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from async_rl.objective.axes import GaeSettings
from async_rl.objective.recipe import Recipe
from async_rl.objective.tokens import Tokens, discounted_suffix_sum, next_in_segment, segment_sum

HEADS = ("V1", "V2", "Q1", "Q2")
"""V1, V2 of the state before a token, Q1, Q2 of the state behind it: at the last token of a turn, of the turn"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Returns:
    """Advantages from a critic, and what the critic is trained on. With Q heads columns are [T, 4]."""

    advantage: Tensor  # [T]
    value: Tensor  # [T] or [T, 4]
    """of the critic as it is"""
    target: Tensor  # [T] or [T, 4], of the critic
    trained: Tensor  # [T] or [T, 4] bool: where the critic's loss is taken

    @property
    def measured(self) -> tuple[Tensor, Tensor]:
        """Value and target where the value is trained; with Q heads those of Q1. Two [n]."""
        head = ... if self.value.ndim == 1 else (..., HEADS.index("Q1"))
        trained = self.trained[head]
        return self.value[head][trained], self.target[head][trained]


def token_gae(tokens: Tokens, reward: Tensor, recipe: Recipe) -> Returns:
    """A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t. `reward` [T].

    V is the critic at the start of the step, so that a batch's later updates have the same advantages and targets.
    """
    assert tokens.value is not None
    assert tokens.value_before is not None
    advantage, target = _scan(
        reward, tokens.value_before, tokens.value_slow, tokens.trajectory, tokens.owner_of_token, tokens, recipe
    )
    trained = _trained(tokens, recipe.gae)[tokens.trajectory]
    return Returns(advantage=advantage, value=tokens.value, target=target, trained=trained)


def turn_gae(tokens: Tokens, reward: Tensor, recipe: Recipe) -> Returns:
    """The same over turns, V of a turn being the value before its first token (arXiv 2512.17008). `reward` [T].

    Every token of a turn gets the turn's advantage; the critic is trained on the first.
    """
    assert tokens.value is not None
    assert tokens.value_before is not None
    first, _ = _ends(tokens)
    slow = None if tokens.value_slow is None else tokens.value_slow[first]
    advantage, target = _scan(
        tokens.sum_turn(reward), tokens.value_before[first], slow, tokens.trajectory_of_turn, tokens.owner_of_turn,
        tokens, recipe,
    )  # fmt: skip
    trained = torch.zeros_like(tokens.turn, dtype=torch.bool)
    trained[first] = True
    trained &= _trained(tokens, recipe.gae)[tokens.trajectory]
    return Returns(advantage=advantage[tokens.turn], value=tokens.value, target=target[tokens.turn], trained=trained)


def turn_q(tokens: Tokens, reward: Tensor, recipe: Recipe) -> Returns:
    """A = min(Q1, Q2) - min(V1, V2) of each turn (ArCHer, arXiv 2402.19446). `reward` [T].

    Q_i is trained towards the turn's reward + gamma V_i of the next turn, V_i towards Q_i of the turn that was sampled,
    both right-hand sides by the target network.
    """
    now, slow = tokens.turn_values, tokens.turn_values_slow
    assert now is not None
    assert slow is not None
    first, last = _ends(tokens)
    per_turn, discount = tokens.sum_turn(reward), recipe.advantage.discount
    target, trained = torch.zeros_like(now), torch.zeros_like(now, dtype=torch.bool)
    counted = _trained(tokens, recipe.gae)[tokens.trajectory_of_turn]
    for head in (0, 1):
        value = slow[first, head]
        following = tokens.recur(_next, value, _behind(value, tokens.trajectory_of_turn, tokens, recipe.gae),
                                 tokens.owner_of_turn)  # fmt: skip
        target[first, head], trained[first, head] = slow[last, 2 + head], counted
        target[last, 2 + head], trained[last, 2 + head] = per_turn + discount * following, counted
    advantage = now[last, 2:].amin(1) - now[first, :2].amin(1)
    return Returns(advantage=advantage[tokens.turn], value=now, target=target, trained=trained)


def _ends(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """First and last token of each turn, two [U] int64."""
    last = tokens.turn_length.cumsum(0).long() - 1
    return last + 1 - tokens.turn_length.long(), last


def _behind(value: Tensor, trajectory: Tensor, tokens: Tokens, settings: GaeSettings) -> Tensor:
    """Value behind the last row of a trajectory: 0, or where it goes on or counts as if it did, that of the row (EGAE).
    value [rows]; trajectory [rows] int64."""
    goes_on = tokens.columns.truncated if settings.bootstrap_truncated else None
    if (cut := tokens.columns.cut) is not None:
        goes_on = cut if goes_on is None else goes_on | cut
    return torch.zeros_like(value) if goes_on is None else torch.where(goes_on[trajectory], value, 0.0)


def _scan(
    reward: Tensor, value: Tensor, slow: Tensor | None, trajectory: Tensor, owner: Tensor, tokens: Tokens,
    recipe: Recipe,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantage with the policy's trace and target with the critic's, [rows] each, where rows are tokens or turns.

    reward, value [rows]; slow [rows]: values of the target network, with which the critic's target is formed;
    trajectory, owner [rows] int64.
    """
    settings, discount = recipe.gae, recipe.advantage.discount

    def differences(values: Tensor) -> Tensor:  # [rows] -> [rows]
        return (
            reward
            + discount * tokens.recur(_next, values, _behind(values, trajectory, tokens, settings), owner)
            - values
        )

    delta = differences(value)
    trace = torch.full_like(value, settings.trace)
    if settings.length_adaptive > 0:
        rows = segment_sum(torch.ones_like(value), owner, tokens.num_owners)
        trace = (1 - 1 / (settings.length_adaptive * rows).clamp(min=1.0))[owner]
    advantage = tokens.recur(discounted_suffix_sum, delta, discount * trace, owner)
    critic_trace = torch.full_like(value, settings.critic_trace)
    if slow is not None:
        value, delta = slow, differences(slow)
    target = tokens.recur(discounted_suffix_sum, delta, discount * critic_trace, owner) + value
    return advantage, target


def _next(values: Tensor, last: Tensor, segment: Tensor) -> Tensor:
    return next_in_segment(values, segment, last=last)


def _trained(tokens: Tokens, settings: GaeSettings) -> Tensor:
    """Trajectories on which the critic is trained, [I] bool: not on pieces of episodes that go on, whose return is not
    known."""
    known = tokens.finite if tokens.columns.cut is None else tokens.finite & ~tokens.columns.cut
    return known & ~tokens.columns.truncated if settings.value_finished_only else known


def with_median(tokens: Tokens, returns: Returns, gradient: Tensor, share: Tensor) -> Tensor:
    """The gradient of the value loss with that of the median's beside it: of softplus(q - u) - (q - u) / 2 with the
    return q = A + V that the policy is told of (BPO). gradient, share [T] -> [T, 2]."""
    assert tokens.columns.median is not None
    assert tokens.value_before is not None
    above = returns.advantage + tokens.value_before - tokens.columns.median.double()
    return torch.stack([gradient, share * (0.5 - torch.sigmoid(above)).nan_to_num()], 1)


def value_loss(tokens: Tokens, returns: Returns, settings: GaeSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over trained tokens of 1/2 max((V - ret)^2, (V_before + clip(V - V_before) - ret)^2); with Q heads the sum
    of such means without a bound.

    Returns d loss / d V [T] or [T, 4], the weight of each row in the mean (alike), and the loss []. Where both branches
    tie the unclipped one counts.
    """
    value = returns.value
    share = returns.trained.to(value.dtype) / returns.trained.sum(0).clamp(min=1)
    error = value - returns.target
    gradient, square = error, error.square()
    if settings.value_clip > 0 and value.ndim == 1:
        before = tokens.value_before
        assert before is not None
        step = value - before
        bounded = before + step.clamp(-settings.value_clip, settings.value_clip) - returns.target
        worse = bounded.square() > square
        inside = step.abs() <= settings.value_clip
        gradient = torch.where(worse, bounded * inside, gradient)
        square = torch.maximum(square, bounded.square())
    return gradient * share, share, 0.5 * (square * share).sum()
