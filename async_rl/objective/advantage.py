"""Advantages: what is credited, compared with what, divided by what; OPOB's baseline. With a
critic: returns.py.

Formulas: docs/algorithms.md#advantages, #opob. Shapes: T policy tokens, U turns, I trajectories, G groups; all
float64.

A value is given to every trajectory, turn or token, centred within a set of comparable ones (the group, the same turn
of the group, the same environment state) and spread to the tokens. The outcome (`reward`) and turn rewards are separate
amounts: trajectory credit sees the outcome alone, finer credit sees turn rewards where they fell and the outcome at the
last token. Columns hold policy tokens only, so prompt and tool tokens never enter a sum or a recursion. Where a
trajectory has several agents, finer credit looks along the turns of each, and compares each with itself
(docs/algorithms.md#several-agents).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from async_rl.objective.axes import AdvantageSettings
from async_rl.objective.bilevel import bilevel_gae
from async_rl.objective.modulation import with_equal_groups
from async_rl.objective.recipe import Recipe
from async_rl.objective.returns import Returns, token_gae, turn_gae, turn_q
from async_rl.objective.tokens import (
    Tokens,
    behaviour_log_ratio,
    discounted_suffix_sum,
    segment_log_sum_exp,
    segment_max,
    segment_min,
    segment_sum,
)
from async_rl.objective.tree import path_mean, root_of, segment_gain, tree_gain
from async_rl.trajectory.parts import PREFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantage:
    """The advantage of every token, and what a baseline or a critic that is found later needs."""

    per_token: Tensor  # [T]
    """what the trust rule sees. With an exact OPOB: R_i / scale, before the baseline is subtracted"""
    unit: Tensor | None = None  # [T]
    """with OPOB: 1 / scale, what the baseline multiplies; 0 in groups of equal rewards"""
    opob: Opob | None = None
    returns: Returns | None = None
    """targets of the critic"""
    zero_signal: Tensor  # [I] bool: its group has equal rewards


def advantage_of(tokens: Tokens, recipe: Recipe, penalty: Tensor | None) -> Advantage:
    """The recipe's advantages. `penalty` [T]: subtracted from token rewards (KL in the reward)."""
    settings = recipe.advantage
    reward = tokens.reward if penalty is None else tokens.reward - tokens.sum_trajectory(penalty)
    zero_signal = _equal(reward, tokens)[tokens.group_of_trajectory]
    returns, unit, opob = None, None, None
    match settings.credit:
        case "trajectory":
            if settings.parts == "each":
                per_token = parts_advantage(tokens, settings)[tokens.trajectory]
            elif settings.baseline == "opob":
                per_trajectory, per_unit = opob_parts(tokens, reward, recipe)
                per_token, unit = per_trajectory[tokens.trajectory], per_unit[tokens.trajectory]
                opob = Opob(values=per_trajectory, units=per_unit)
            else:
                per_token = group_advantage(tokens, reward, settings)[tokens.trajectory]
        case "turn_return":
            per_token = _compared_returns(tokens, reward, penalty, settings)[tokens.turn]
        case "turn_group":
            per_token = _turn_group(tokens, reward, penalty, settings)[tokens.turn]
        case "gigpo":
            per_token = _gigpo(tokens, reward, penalty, settings)[tokens.turn]
        case "path_mean":
            compared = group_advantage(tokens, reward, settings)
            if settings.trees == "both":
                root = root_of(tokens)
                compared = compared + _compare(
                    reward, root, int(root.max()) + 1 if len(root) else 0, settings, counted=tokens.compared,
                    length=tokens.length, batch_values=reward,
                )  # fmt: skip
            per_token = path_mean(tokens, compared)
        case "segment_gain":
            per_token = segment_gain(tokens, reward)
        case "tree_gain":
            per_token = tree_gain(tokens, reward)
        case "token_return":
            per_token = _token_returns(tokens, reward, penalty, settings)
        case "token_gae":
            returns = token_gae(tokens, token_rewards(tokens, tokens.reward, penalty), recipe)
            per_token = returns.advantage
        case "turn_gae":
            returns = turn_gae(tokens, token_rewards(tokens, tokens.reward, penalty), recipe)
            per_token = returns.advantage
        case "bilevel_gae":
            returns = bilevel_gae(tokens, token_rewards(tokens, tokens.reward, penalty), recipe)
            per_token = returns.advantage
        case "turn_q":
            returns = turn_q(tokens, token_rewards(tokens, tokens.reward, penalty), recipe)
            per_token = returns.advantage
    if settings.equal != "nothing":
        per_token = with_equal_groups(tokens, per_token, zero_signal, settings)
    if settings.whiten:
        per_token = whitened(per_token, tokens)
    if settings.whiten_trajectories:
        filtered = recipe.select.drop_equal_rewards or recipe.select.drop_zero_signal
        among = tokens.finite & ~(zero_signal & filtered)
        per_token = _whitened_trajectories(tokens.mean_trajectory(per_token), tokens, among)[tokens.trajectory]
    per_token = torch.where(tokens.finite[tokens.trajectory], per_token, 0.0)
    return Advantage(per_token=per_token, unit=unit, opob=opob, returns=returns, zero_signal=zero_signal)


def token_rewards(tokens: Tokens, outcome: Tensor, penalty: Tensor | None) -> Tensor:
    """Turn rewards where they fell, the outcome at the last policy token (of each agent), less `penalty`. [T]

    outcome [I], penalty [T].
    """
    reward = tokens.token_reward.clone()
    if (speakers := tokens.speakers) is not None:
        place = torch.arange(tokens.num_tokens, device=reward.device)
        last = torch.zeros_like(speakers.trajectory).scatter_reduce_(0, tokens.owner_of_token, place, "amax")
        reward.index_add_(0, last, outcome[speakers.trajectory])
    else:
        has_tokens = tokens.length > 0
        last = tokens.length.cumsum(0).long() - 1
        reward.index_add_(0, last[has_tokens], outcome[has_tokens])
    return reward if penalty is None else reward - penalty


def group_advantage(tokens: Tokens, reward: Tensor, settings: AdvantageSettings) -> Tensor:
    """(R - baseline) / scale of each trajectory within its group, [I]. `reward` [I].

    A group of equal rewards gives exactly 0 (virtual_max and no baseline excepted), and so does a group of
    one. Trajectories without a finite reward are not compared with and get 0.
    """
    if settings.baseline == "noted":
        reward = reward - _noted_baseline(tokens, settings.note)
    if settings.baseline == "greedy":
        reward = reward - greedy_reward(tokens, reward)[tokens.group_of_trajectory].nan_to_num()
    advantage = _compare(
        reward, tokens.group_of_trajectory, tokens.num_groups, settings,
        counted=tokens.compared, length=tokens.length, batch_values=reward,
    )  # fmt: skip
    if settings.baseline_shift != 0:
        return torch.where(tokens.compared, advantage - settings.baseline_shift, 0.0)
    return advantage


def parts_advantage(tokens: Tokens, settings: AdvantageSettings) -> Tensor:
    """Each named part of the reward compared within its group by itself, then weighed and summed (GDPO). [I]

    A part that an episode does not have is not compared with, and adds nothing to it.
    """
    noted, total = tokens.columns.noted, torch.zeros_like(tokens.reward)
    for name, column in noted.trajectory.items():
        if not name.startswith(PREFIX):
            continue
        there = tokens.compared & ~column.isnan()
        values = torch.where(there, column.double(), 0.0)
        compared = _compare(
            values, tokens.group_of_trajectory, tokens.num_groups, settings, counted=there, length=tokens.length,
            batch_values=values,
        )  # fmt: skip
        total = total + noted.weights.get(name.removeprefix(PREFIX), 1.0) * compared
    return total


def _whitened_trajectories(values: Tensor, tokens: Tokens, among: Tensor) -> Tensor:
    """Mean 0 and sample std 1 over the batch's trajectories with tokens, among [I] bool. [I]"""
    counted = among & (tokens.length > 0)
    known = values[counted]
    if len(known) < 2:
        return torch.zeros_like(values)
    std = known.std(correction=1)
    return torch.where(counted & (std > 0), (values - known.mean()) / (std + 1e-4), 0.0)


def greedy_reward(tokens: Tokens, reward: Tensor) -> Tensor:
    """Reward [I] of the greedy sample of each group, NaN where there is none. [G]"""
    greedy = tokens.columns.greedy
    chosen = tokens.rewarded & greedy if greedy is not None else torch.zeros_like(tokens.rewarded)
    count = tokens.sum_group(chosen.to(reward.dtype))
    return torch.where(count > 0, tokens.sum_group(torch.where(chosen, reward, 0.0)) / count.clamp(min=1.0), torch.nan)


def _noted_baseline(tokens: Tokens, name: str) -> Tensor:
    """The task's note of each trajectory, 0 where there is none: `select` leaves those out. [I]"""
    column = tokens.columns.noted.trajectory.get(name)
    return torch.zeros_like(tokens.reward) if column is None else column.double().nan_to_num(nan=0.0)


def _compare(
    values: Tensor, key: Tensor, num_keys: int, settings: AdvantageSettings,
    *, counted: Tensor, length: Tensor | None = None, batch_values: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Centre and scale `values` [n] within equal `key`s [n] int64; [n]. n trajectories or turns.

    counted [n] bool: those in means and stds; the others get 0. length [n], for baseline length_weighted.
    """
    weight = counted.to(values.dtype)
    count = segment_sum(weight, key, num_keys)
    safe = count.clamp(min=1.0)
    mean = segment_sum(values * weight, key, num_keys) / safe
    total, size = mean * count, count
    if settings.baseline == "virtual_max":
        mean, size = (total + settings.reward_max) / (count + 1), count + 1
    match settings.baseline:
        case "none" | "noted" | "greedy":
            centred = values
        case "leave_one_out":
            others = (count - 1).clamp(min=1.0)[key]
            centred = (values - mean[key]) * count[key] / others
        case "length_weighted":
            assert length is not None
            mass = segment_sum(length * weight, key, num_keys)
            weighted = segment_sum(values * length * weight, key, num_keys)
            centred = values - torch.where(mass > 0, weighted / mass.clamp(min=1.0), mean)[key]
        case "distinct_mean":
            centred = values - _distinct_mean(values, key, num_keys, counted)[key]
        case "quantile":
            centred = values - _quantile(values, key, num_keys, counted, settings.quantile)[key]
        case "soft_mean":
            tilted = torch.where(counted, values / settings.soft_temperature, -torch.inf)
            total = segment_log_sum_exp(tilted, key, num_keys) - safe.log()
            centred = values - settings.soft_temperature * torch.where(count > 0, total, 0.0)[key]
        case _:
            centred = values - mean[key]
    scaled = centred / _scale(values, key, num_keys, settings, weight, mean, size, batch_values)
    if settings.scale == "group_mean":
        scaled = torch.where(mean[key] > 0, scaled, 0.0)
    if settings.baseline not in ("none", "virtual_max", "noted", "greedy"):
        scaled = torch.where(_constant(values, key, num_keys, counted)[key], 0.0, scaled)
    return torch.where(counted, scaled, 0.0)


def _quantile(values: Tensor, key: Tensor, num_keys: int, counted: Tensor, share: float) -> Tensor:
    """The smallest of the counted values under each key that at least `share` of them do not exceed: [n], [n] int64,
    [n] bool -> [keys]"""
    chosen, owner = values[counted], key[counted]
    order = torch.argsort(chosen, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    size = torch.bincount(owner, minlength=num_keys)
    if len(order) == 0:
        return values.new_zeros(num_keys)
    place = (size.double() * share - 1e-9).ceil().long().clamp(min=1) - 1 + size.cumsum(0) - size
    return torch.where(size > 0, chosen[order[place.clamp(max=len(order) - 1)]], 0.0)


def _distinct_mean(values: Tensor, key: Tensor, num_keys: int, counted: Tensor) -> Tensor:
    """Mean of the values that occur under each key, each once: [n], [n] int64, [n] bool -> [keys]."""
    pairs = torch.stack([key[counted].to(values.dtype), values[counted]], 1)
    once = torch.unique(pairs, dim=0)
    owner = once[:, 0].long()
    size = torch.bincount(owner, minlength=num_keys).clamp(min=1)
    return segment_sum(once[:, 1], owner, num_keys) / size


def _scale(
    values: Tensor, key: Tensor, num_keys: int, settings: AdvantageSettings,
    weight: Tensor, mean: Tensor, size: Tensor, batch_values: Tensor | None,
) -> Tensor:  # fmt: skip
    """What `_compare` divides by, [n]; never 0. weight [n] is 1 for the counted; mean, size [keys]."""
    if settings.scale == "none":
        return torch.ones_like(values)
    if settings.scale == "group_mean":
        positive = torch.where(mean > 0, mean, torch.ones_like(mean))
        return positive[key]
    less = 1.0 if settings.std == "sample" else 0.0
    if settings.scale == "batch_std":
        total = weight.sum().clamp(min=1.0)
        batch_mean = (values * weight).sum() / total
        variance = ((values - batch_mean).square() * weight).sum() / (total - less).clamp(min=1.0)
        return (variance.sqrt() + settings.std_epsilon).expand_as(values)
    if settings.scale == "beta":
        return _beta_density(mean, segment_sum(weight, key, num_keys) > 0)[key]
    square = segment_sum((values - mean[key]).square() * weight, key, num_keys)
    if settings.baseline == "virtual_max":
        square = square + (settings.reward_max - mean).square()
    std = (square / (size - less).clamp(min=1.0)).sqrt() + settings.std_epsilon
    if settings.scale == "mixed":
        right = segment_sum(weight * (values > 0), key, num_keys) / segment_sum(weight, key, num_keys).clamp(min=1.0)
        unsure = 4 * right * (1 - right)
        by_mean = torch.where(mean > 0, (1 - unsure) / torch.where(mean > 0, mean, 1.0), 0.0)
        return 1 / (unsure / std + by_mean).clamp(min=torch.finfo(std.dtype).tiny)[key]
    return std[key]


def _beta_density(mean: Tensor, counted: Tensor) -> Tensor:
    """BNPO: density at each mean of Beta(1 + a / 3, 1 + b / 3), with Beta(a, b) having the mean and variance of the
    counted ones; 1 where there is no such distribution. [keys], [keys] bool -> [keys]"""
    known = mean[counted]
    one = torch.ones_like(mean)
    if len(known) == 0:
        return one
    middle, variance = known.mean(), known.var(correction=0)
    if not 0 < float(variance) < float(middle * (1 - middle)):
        return one
    both = middle * (1 - middle) / variance - 1
    alpha, beta = 1 + middle * both / 3, 1 + (1 - middle) * both / 3
    inside = (mean > 0) & (mean < 1)
    at = torch.where(inside, mean, 0.5)
    log_density = (alpha - 1) * at.log() + (beta - 1) * (1 - at).log()
    log_density = log_density + torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
    return torch.where(inside, log_density.exp(), 1.0)


def _constant(values: Tensor, key: Tensor, num_keys: int, counted: Tensor) -> Tensor:
    """Whether all counted values of a key are equal, [keys] bool. Exact, unlike a variance."""
    highest = segment_max(torch.where(counted, values, -torch.inf), key, num_keys, empty=-torch.inf)
    lowest = segment_min(torch.where(counted, values, torch.inf), key, num_keys, empty=torch.inf)
    return ~(highest > lowest)


def _equal(reward: Tensor, tokens: Tokens) -> Tensor:
    """Whether all rewards [I] of a group are equal, [G] bool."""
    return _constant(reward, tokens.group_of_trajectory, tokens.num_groups, tokens.compared)


def opob_parts(tokens: Tokens, reward: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """What OPOB's baseline is subtracted from, and what it multiplies, two [I]. `reward` [I].

    Scope group: R / scale and 1 / scale. Scope batch: the group-centred, scaled reward, and 1.
    Both 0 where all rewards within the scope are equal, so that the gradient there is exactly 0.
    """
    settings = recipe.advantage
    group = tokens.group_of_trajectory
    if recipe.opob.scope == "batch":
        values = _group_mean_advantage(tokens, reward, settings)
        one = torch.zeros_like(group)
        dead = _constant(values, one, 1, tokens.compared)[one]
        alive = tokens.compared & ~dead
        return torch.where(alive, values, 0.0), alive.to(values.dtype)
    weight = tokens.compared.to(reward.dtype)
    count = tokens.sum_group(weight)
    mean = tokens.sum_group(reward * weight) / count.clamp(min=1.0)
    scale = _scale(reward, group, tokens.num_groups, settings, weight, mean, count, reward)
    alive = tokens.compared & ~_equal(reward, tokens)[group]
    return torch.where(alive, reward / scale, 0.0), torch.where(alive, 1 / scale, 0.0)


def _group_mean_advantage(tokens: Tokens, reward: Tensor, settings: AdvantageSettings) -> Tensor:
    """`group_advantage` with the group's mean, [I]."""
    return group_advantage(tokens, reward, replace(settings, baseline="group_mean"))


def turn_returns(tokens: Tokens, reward: Tensor, penalty: Tensor | None, discount: float) -> Tensor:
    """R_k = sum_{j >= k} gamma^(j-k) r_j over the turns of the trajectory (or of its agent), outcome in the last.
    [U]"""
    per_turn = tokens.sum_turn(token_rewards(tokens, tokens.reward, penalty))
    decay = torch.full_like(per_turn, discount)
    return tokens.recur(discounted_suffix_sum, per_turn, decay, tokens.owner_of_turn)


def _compared_returns(tokens: Tokens, reward: Tensor, penalty: Tensor | None, settings: AdvantageSettings) -> Tensor:
    """Returns of turns against those of other turns, or returns of rewards that were compared so. [U]"""
    first = 0.0 if settings.turns == "rewards" else settings.discount
    values = _centre_turns(tokens, turn_returns(tokens, reward, penalty, first), settings)
    if settings.turns == "returns":
        return values
    decay = torch.full_like(values, settings.discount)
    return tokens.recur(discounted_suffix_sum, values, decay, tokens.owner_of_turn)


def _centre_turns(tokens: Tokens, values: Tensor, settings: AdvantageSettings) -> Tensor:
    """Turns, values [U], against all turns (of the same agent) in their group or in the batch. [U]"""
    key, num_keys = tokens.group_of_trajectory[tokens.trajectory_of_turn], tokens.num_groups
    if settings.among == "batch":
        key, num_keys = torch.zeros_like(key), 1
    if tokens.speakers is not None:
        key, num_keys = _pairs(key, tokens.speakers.agent)
    counted = tokens.compared[tokens.trajectory_of_turn]
    return _compare(values, key, num_keys, settings, counted=counted, length=tokens.turn_length)


def _turn_group(tokens: Tokens, reward: Tensor, penalty: Tensor | None, settings: AdvantageSettings) -> Tensor:
    """Turn rewards against the same turn (of the same agent) in the group, plus the outcome's group advantage. [U]"""
    own = tokens.sum_turn(tokens.token_reward if penalty is None else tokens.token_reward - penalty)
    trajectory = tokens.trajectory_of_turn
    ones = torch.ones_like(own)
    left = tokens.recur(discounted_suffix_sum, ones, ones, tokens.owner_of_turn)  # turns from this one on
    turns = segment_sum(ones, tokens.owner_of_turn, tokens.num_owners)
    number = (turns[tokens.owner_of_turn] - left).long()
    group = tokens.group_of_trajectory[trajectory]
    if tokens.speakers is not None:
        group, _ = _pairs(group, tokens.speakers.agent)
    key, num_keys = _pairs(group, number)
    within = _compare(own, key, num_keys, settings, counted=tokens.compared[trajectory],
                      length=tokens.turn_length)  # fmt: skip
    outcome = group_advantage(tokens, tokens.reward, settings)[trajectory]
    return settings.turn_weight * within + settings.outcome_weight * outcome


def _gigpo(tokens: Tokens, reward: Tensor, penalty: Tensor | None, settings: AdvantageSettings) -> Tensor:
    """Episode advantage in the group, plus the return of the turn against turns that began in the same state. [U]

    The states compared are those of the group; the second part is 0 where the state is unknown or met once. Of several
    agents each has its own return, and is compared with itself.
    """
    trajectory = tokens.trajectory_of_turn
    values = turn_returns(tokens, reward, penalty, settings.discount)
    key, num_keys = _pairs(tokens.group_of_trajectory[trajectory], tokens.state_key)
    known = (tokens.state_key >= 0) & tokens.compared[trajectory]
    step = _compare(values, key, num_keys, settings, counted=known, length=tokens.turn_length)
    earned = segment_sum(tokens.sum_turn(tokens.token_reward), tokens.owner_of_turn, tokens.num_owners)
    if (speakers := tokens.speakers) is None:
        episode = group_advantage(tokens, reward + earned, settings)[trajectory]
    else:
        agent = torch.zeros_like(speakers.trajectory).index_copy_(0, speakers.of_turn, speakers.agent)
        key, num_keys = _pairs(tokens.group_of_trajectory[speakers.trajectory], agent)
        total = reward[speakers.trajectory] + earned
        episode = _compare(
            total, key, num_keys, settings, counted=tokens.compared[speakers.trajectory],
            length=segment_sum(tokens.turn_length, speakers.of_turn, tokens.num_owners), batch_values=total,
        )[speakers.of_turn]  # fmt: skip
    return settings.turn_weight * step + settings.outcome_weight * episode


def _pairs(first: Tensor, second: Tensor) -> tuple[Tensor, int]:
    """An index [n] int64 for every distinct pair of first and second, [n] int64 each, and how many there are."""
    if len(first) == 0:
        return first, 0
    second = torch.unique(second, return_inverse=True)[1]
    distinct, index = torch.unique(first * (int(second.max()) + 1) + second, return_inverse=True)
    return index, len(distinct)


def _token_returns(tokens: Tokens, reward: Tensor, penalty: Tensor | None, settings: AdvantageSettings) -> Tensor:
    """Discounted return-to-go of every token (REINFORCE++), of the baselined outcome. [T]"""
    outcome = group_advantage(tokens, tokens.reward, settings)
    per_token = token_rewards(tokens, outcome, penalty)
    decay = torch.full_like(per_token, settings.discount)
    return tokens.recur(discounted_suffix_sum, per_token, decay, tokens.owner_of_token)


def whitened(values: Tensor, tokens: Tokens) -> Tensor:
    """Mean 0 and sample std 1 over the batch's tokens of finite trajectories. [T]"""
    ok = tokens.finite[tokens.trajectory].to(values.dtype)
    count = ok.sum()
    mean = (values * ok).sum() / count.clamp(min=1.0)
    variance = ((values - mean).square() * ok).sum() / (count - 1).clamp(min=1.0)
    return (values - mean) * (variance + 1e-8).rsqrt()


# OPOB, the off-policy optimal baseline (VCPO; docs/algorithms.md#opob): sum W R / sum W with W the squared gradient
# norms. It minimises the second moment of the estimator sum_i g_i (R_i - b) when W_i = |g_i|^2 with g_i the gradient of
# trajectory i exactly as it enters the step (weight "estimator"). Weights live in log space, so that neither underflow
# nor overflow of importance weights changes the result.


@dataclass(frozen=True, slots=True, kw_only=True)
class Opob:
    """The gradient is sum_i g_i (values_i - b units_i); the baseline is in units of values / units."""

    values: Tensor  # [I]
    units: Tensor  # [I], 0 where nothing is subtracted


def optimal_baseline(log_weight: Tensor, opob: Opob, tokens: Tokens, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The baseline of each group, and the largest share of W in it, two [G], from log W [I].

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
    """log W [I] from the log squared gradient norm of each trajectory's `baseline` column.

    log_norm_square: [I], log |sum_t column_t grad log pi_t|^2
    column: [T], the baseline column; weights paper and reference_code need it constant in a trajectory
    trust_weight: [T], the weight kappa inside the column
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
    """log of sum_t column_t^2 energy_t, the cheap estimate of a trajectory's squared gradient norm: [T] -> [I].

    energy: 1 (length) or 1 - 2 pi + sum_v pi_v^2, the squared norm of d log pi / d logits (logit). -inf where the sum
    is 0.
    """
    return tokens.sum_trajectory(column.square() * energy(tokens, norm)).log()


def energy(tokens: Tokens, norm: str) -> Tensor:
    """Squared gradient norm of log pi_t at the logits, or 1. [T]"""
    if norm == "length":
        return torch.ones_like(tokens.log_prob)
    assert tokens.prob_square_sum is not None
    return (1 - 2 * tokens.log_prob.exp() + tokens.prob_square_sum).clamp(min=0.0)
