"""What becomes of rewards before they are compared: what counts as right, lengths, ranks, risk, the best of k.

Formulas: docs/algorithms.md#reward-shaping, #length-rewards, #best-of-k. Shapes: I trajectories, G groups, n
trajectories of a group; float64. Rewards that are not finite stay out of every statistic, and 0.
"""

from __future__ import annotations

from fractions import Fraction
from math import comb

import torch
from torch import Tensor

from async_rl.objective.group_table import GroupTable
from async_rl.objective.reward_axes import RewardSettings
from async_rl.objective.tokens import Tokens


def shaped_reward(tokens: Tokens, settings: RewardSettings) -> Tensor:
    """The outcomes that are compared, [I]."""
    table = GroupTable.of(tokens, tokens.rewarded)
    reward = _outcome(tokens, table, settings)
    right = (tokens.reward > settings.threshold) & tokens.rewarded
    if settings.truncated_wrong:
        cut = tokens.columns.truncated
        reward, right = torch.where(cut, settings.wrong, reward), right & ~cut
    if settings.length != "none":
        reward = _by_length(tokens, table, settings, reward, right)
    if settings.unlikely > 0:
        likely = table.spread(-tokens.sum_trajectory(tokens.log_behaviour), torch.inf)
        rank = table.gather((table.rank(likely) + 1).double())
        size = table.gather(table.size.double().expand_as(likely))
        reward = reward * (1 - settings.unlikely * (size - rank) / size.clamp(min=1.0))
    if settings.bonus_note:
        noted = tokens.columns.noted.trajectory.get(settings.bonus_note)
        if noted is not None:
            reward = reward + settings.bonus * noted.double().nan_to_num(nan=0.0)
    if settings.overlong_limit > 0:
        over = tokens.length - (settings.overlong_limit - settings.overlong_buffer)
        reward = reward - settings.overlong_penalty * (over / settings.overlong_buffer).clamp(0.0, 1.0)
    if settings.risk > 0:
        tilted = (settings.risk * table.spread(reward)).exp()
        reward = table.gather(tilted / (settings.risk * table.mean(tilted, table.there).clamp(min=1e-300)))
    if settings.pass_k > 0:
        if settings.pass_form == "advantage":
            reward = table.gather(_pass_advantage(table, table.spread(right.double()), settings.pass_k))
        else:
            reward = table.gather(_marginal(table, table.spread(reward, torch.inf), settings.pass_k))
    return torch.where(tokens.rewarded, reward, 0.0)


def _outcome(tokens: Tokens, table: GroupTable, settings: RewardSettings) -> Tensor:
    """[I]"""
    reward = tokens.reward
    match settings.outcome:
        case "indicator":
            worth = reward.new_tensor([settings.wrong, settings.right])
            return worth[(reward > settings.threshold).long()]
        case "certainty":
            assert tokens.entropy is not None
            return -tokens.mean_trajectory(tokens.entropy)
        case "majority" | "agreement":
            return _agreement(tokens, table, settings)
        case _:
            return reward


def _agreement(tokens: Tokens, table: GroupTable, settings: RewardSettings) -> Tensor:
    """Share of the group that gave the same answer; or 1 for the answer given most often, of several the one given
    first. 0 without an answer. [I]"""
    noted = tokens.columns.noted.trajectory.get(settings.answer_note)
    if noted is None:
        return torch.zeros_like(tokens.reward)
    answer = table.spread(noted.double(), torch.nan)
    alike = (answer[:, :, None] == answer[:, None, :]).sum(2)  # [G, n]; nan equals nothing
    if settings.outcome == "agreement":
        return table.gather(alike.double() / table.size.clamp(min=1))
    if answer.shape[1] == 0:
        return torch.zeros_like(tokens.reward)
    columns = torch.arange(answer.shape[1], device=answer.device)
    first = (alike * (len(columns) + 1) - columns).argmax(1, keepdim=True)
    return table.gather((answer == answer.gather(1, first)).double())


def _by_length(tokens: Tokens, table: GroupTable, settings: RewardSettings, reward: Tensor, right: Tensor) -> Tensor:
    """The reward with the length's share. reward [I], right [I] bool -> [I]"""
    length, weight = tokens.length, settings.length_weight
    if settings.length in ("target", "target_max", "within"):
        target = torch.full_like(length, float(settings.length_target))
        noted = tokens.columns.noted.trajectory.get(settings.length_target_note)
        if noted is not None:
            target = torch.where(noted.isnan(), target, noted.double())
        match settings.length:
            case "target":
                return reward - weight * (target - length).abs()
            case "target_max":
                return reward * (weight * (target - length) + 0.5).clamp(0.0, 1.0)
            case _:
                return reward + weight * (right & (length <= target))
    rights, lengths = table.spread(right.double()) > 0, table.spread(length)
    match settings.length:
        case "range":
            short = torch.where(table.there, lengths, torch.inf).amin(1, keepdim=True)
            spread = torch.where(table.there, lengths, -torch.inf).amax(1, keepdim=True) - short
            place = torch.where(spread > 0, 0.5 - (lengths - short) / spread.clamp(min=1.0), 0.0)
            return reward + weight * table.gather(torch.where(rights, place, place.clamp(max=0.0)))
        case "solve_rate":
            rate = rights.double().sum(1, keepdim=True).clamp(min=1.0) / table.size.clamp(min=1)
            return reward - weight * length * table.gather(rate.expand_as(lengths))
        case "shortest_right":
            shortest = torch.where(rights, lengths, torch.inf).amin(1, keepdim=True)
            wanted = torch.where(rights.any(1, keepdim=True), shortest, table.mean(lengths, table.there))
            return reward - weight * table.gather((lengths - wanted).abs())
    mean = table.mean(lengths, rights)
    std = table.mean((lengths - mean).square(), rights).sqrt()
    z = table.gather(torch.where(std > 0, (lengths - mean) / std.clamp(min=1e-12), 0.0))
    factor = 1 - weight * torch.sigmoid(z) if settings.length == "sigmoid" else (-weight * z).exp()
    return torch.where(right, reward * factor, reward)


def _pass_advantage(table: GroupTable, right: Tensor, k: int) -> Tensor:
    """Pass@k training: with n answers, m of them wrong, mean = 1 - C(m, k) / C(n, k) and std of the reward of k answers
    drawn together, right ones get (1 - mean) / std, wrong ones (1 - mean - C(m-1, k-1) / C(n-1, k-1)) / std. right [G,
    n], 0 or 1 -> [G, n]"""
    size, rights = table.size.double(), right.sum(1, keepdim=True)
    wrongs = size - rights
    none, none_beside = torch.ones_like(size), torch.ones_like(size)
    for taken in range(k):
        none = none * ((wrongs - taken) / (size - taken).clamp(min=1.0)).clamp(min=0.0)
        if taken > 0:
            none_beside = none_beside * ((wrongs - taken) / (size - taken).clamp(min=1.0)).clamp(min=0.0)
    std = (none * (1 - none)).sqrt()
    value = (none - none_beside * (1 - right)) / torch.where(std > 0, std, 1.0)
    return torch.where((std > 0) & (size >= k) & table.there, value, 0.0)


def _marginal(table: GroupTable, reward: Tensor, k: int) -> Tensor:
    """PKPO: the mean over the sets of k answers with this one of max(set) - max(set without it), times k / n. reward
    [G, n], inf where there is none -> [G, n]"""
    groups, columns = reward.shape
    ascending, order = reward.sort(dim=1, stable=True)
    known = torch.arange(columns, device=reward.device) < table.size
    ascending = torch.where(known, ascending, 0.0)
    weight = reward.new_zeros(groups, columns)
    for size in set(table.size.flatten().tolist()):
        # the answer of rank q is the second best of C(q, k - 2) of the C(size, k) sets
        share = [float(Fraction(comb(q, k - 2), comb(size, k))) if size >= k else 0.0 for q in range(columns)]
        weight[(table.size == size).squeeze(1)] = reward.new_tensor(share)
    weight = weight * known
    above = (ascending * (weight.cumsum(1) - weight)) - ((weight * ascending).cumsum(1) - weight * ascending)
    return torch.zeros_like(reward).scatter(1, order, above * known)
