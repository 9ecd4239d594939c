"""What an objective reads and what it answers: columns in, coefficients out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The policy tokens of one optimizer batch, trajectory by trajectory, turn by turn.

    Prompt and environment tokens are not here, so no sum can ever meet one. All tensors are detached
    and on one device; floating columns share one dtype (float32, float64 in tests).
    The gradient of every recipe is `sum_t c_t * grad log pi(y_t)`; an objective answers the `c_t`.
    """

    log_prob: Tensor  # [tokens]
    """log pi_theta of the sampled token under the weights about to be updated"""
    log_behaviour: Tensor  # [tokens]
    """log mu, returned by the generator, at the weights that sampled the token"""
    version: Tensor  # [tokens] int64
    """weight version that sampled the token"""
    turn_of_token: Tensor  # [tokens] int64, non-decreasing
    trajectory_of_turn: Tensor  # [turns] int64, non-decreasing
    group_of_trajectory: Tensor  # [trajectories] int64, non-decreasing, 0..groups-1
    reward: Tensor  # [trajectories]
    turn_reward: Tensor  # [turns]
    state_key: Tensor  # [turns] int64
    """hash of the environment state in which the turn began; -1 unknown"""
    truncated: Tensor  # [trajectories] bool
    """ended by a token or turn limit, not by itself"""
    current_version: int
    """version of the weights about to be updated (= training step)"""
    log_proximal: Tensor | None = None  # [tokens]
    """log-prob under the weights at the start of the step (several updates a batch)"""
    log_reference: Tensor | None = None  # [tokens]
    value: Tensor | None = None  # [tokens]
    """critic's value of the state *before* the token was sampled"""
    value_before: Tensor | None = None  # [tokens]
    """the same at the start of the step, for the clipped value loss (several updates a batch)"""
    entropy: Tensor | None = None  # [tokens]
    """entropy of the distribution the token was sampled from, under the current weights"""
    prob_square_sum: Tensor | None = None  # [tokens]
    """sum over the vocabulary of pi^2, for the logit-space gradient norm"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """What the trainer multiplies gradients with. Everything is detached.

    loss = - sum_t policy[t] log pi_t  (+ sum_t value_grad[t] V_t  - sum_t entropy[t] H_t)

    All columns have the dtype of `Columns.log_prob`.

    Denominators are already inside, so micro-batches and ranks simply add up.
    """

    policy: Tensor  # [tokens]
    """c_t. With an exact baseline: the part that multiplies the reward (see `baseline`), on every
    trajectory a number times `baseline`"""
    baseline: Tensor | None = None  # [tokens]
    """OPOB with exact norms: the gradient is sum(policy*grad) - sum_groups b_g * sum(baseline*grad),
    where the trainer finds b_g from per-trajectory gradient norms (DESIGN.md 7)"""
    entropy: Tensor | None = None  # [tokens]
    value_grad: Tensor | None = None  # [tokens]
    """d(value loss)/d(V_t)"""
    clipped: Tensor | None = None  # [tokens]
    """coefficients of the clipped-away part of the surrogate (ST-PPO's clipping bias)"""
    learning_rate_factors: Mapping[str, float] = field(default_factory=dict)
    """named factors multiplied into this step's learning rate only, e.g. ess_scale and kappa"""
    skip: str = ""
    """not empty: nothing is left to train on; the step leaves the policy's weights and moments unchanged
    (`value_grad` may still be worth a step of the critic)"""
    metrics: Mapping[str, float] = field(default_factory=dict)
