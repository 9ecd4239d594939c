"""Weights of a token as later papers give them: bounds that follow the batch, gates without a clip, target ratios.

Formulas: docs/algorithms.md#soft-gates, #moving-bounds, #inverted-ratio, #log-clip, #target-ratio. Shapes: T policy
tokens, I trajectories, G groups. Each turns (ratio, advantage) into kappa, the weight of the advantage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.objective.axes import TrustSettings
from async_rl.objective.tokens import LARGEST_LOG_RATIO, Ratio, Tokens, pooled, weight_of

MOVING_BOUNDS = ("sat", "bapo", "aspo", "mix_ppo", "dcpo")
"""rules that clip like PPO, at bounds of their own"""
LARGEST_PADDING = 4
"""rows of a table for each value in it, up to which sorting the table is cheaper than sorting all values twice"""


def moving_bounds(
    tokens: Tokens, ratio: Ratio, advantage: Tensor, settings: TrustSettings
) -> tuple[Tensor | float, Tensor | float]:  # [T], or one for all
    """The interval of each token's ratio, for the rules of MOVING_BOUNDS, and for ppo. advantage [T]."""
    if settings.rule == "dcpo":
        return bounds_of_probability(tokens.log_prob - ratio.log, settings)
    if settings.rule == "sat":
        return contracted_bounds(tokens, ratio, settings)
    if settings.rule == "mix_ppo":
        start = pooled(tokens.log_proximal - tokens.log_behaviour, tokens, ratio.level, ratio.pool)
        middle = weight_of(start, ratio.clamp)
        return middle - settings.clip_low, middle + settings.clip_high
    if settings.rule == "bapo":
        return balanced_bounds(ratio.value, advantage, tokens.finite[tokens.trajectory], settings)
    if settings.uncertain_share == 0:
        return 1 - settings.clip_low, 1 + settings.clip_high
    uncertain = most_entropy(tokens, settings.uncertain_share)
    one = torch.ones_like(ratio.value)
    clip_low = torch.where(uncertain, settings.uncertain_clip, settings.clip_low * one)
    clip_high = torch.where(uncertain, settings.uncertain_clip, settings.clip_high * one)
    return 1 - clip_low, 1 + clip_high


def bounds_of_probability(log_old: Tensor, settings: TrustSettings) -> tuple[Tensor, Tensor]:
    """DCPO: where r |r - 1| q meets the clip, q the old probability, so that improbable tokens may move further; at
    most 10. log_old [T] -> two [T]."""
    old = log_old.exp().clamp(min=1e-12)
    low = 0.5 + 0.5 * (1 - 4 * settings.clip_low / old).clamp(min=0.0).sqrt()
    high = 0.5 + 0.5 * (1 + 4 * settings.clip_high / old).sqrt()
    return low, high.clamp(max=10.0)


def contracted_bounds(tokens: Tokens, ratio: Ratio, settings: TrustSettings) -> tuple[Tensor, Tensor]:
    """SAT: the interval of tokens whose |log-ratio| exceeds the gate q, a quantile over the batch, is smaller on their
    own side. Two [T]."""
    size = ratio.log.abs()
    counted = size[tokens.finite[tokens.trajectory]]
    low, high = torch.full_like(size, settings.clip_low), torch.full_like(size, settings.clip_high)
    gate = quantile(counted, settings.quantile) if len(counted) else size.new_zeros(())
    if gate > 0:
        reach = size if settings.contraction == "from_zero" else size - gate
        kept = torch.where(size > gate, 1 / (1 + (reach / gate).square()), 1.0)
        low, high = torch.where(ratio.log < 0, low * kept, low), torch.where(ratio.log > 0, high * kept, high)
    return 1 - low, 1 + high


def balanced_bounds(ratio: Tensor, advantage: Tensor, counted: Tensor, settings: TrustSettings) -> tuple[float, float]:
    """BAPO's bounds for this batch: the lower one is raised step by step to its end, then the upper one, until the
    positive tokens' sum of min(ratio, high) A is `balance` times the negative tokens' of max(ratio, low) |A|.

    ratio, advantage [T]; counted [T] bool. As published the negative sum grows with the lower bound, so that raising it
    brings the goal no nearer; the search is kept as it is (docs/algorithms.md#moving-bounds).
    """
    up = counted & (advantage >= 0)
    down = counted & (advantage < 0)
    gains, rises = advantage[up], ratio[up]
    losses, falls = advantage[down].abs(), ratio[down]
    low, high = settings.low_start, settings.high_start

    def balanced() -> bool:
        negative = (falls.clamp(min=low) * losses).sum()
        return bool((rises.clamp(max=high) * gains).sum() >= settings.balance * negative)

    lows, highs = _steps(low, settings.low_end, settings), _steps(high, settings.high_end, settings)
    for number in range(1, lows + highs + 1):
        if balanced():
            break
        if number <= lows:
            low = min(settings.low_start + number * settings.bound_step, settings.low_end)
        else:
            high = min(settings.high_start + (number - lows) * settings.bound_step, settings.high_end)
    return low, high


def _steps(start: float, end: float, settings: TrustSettings) -> int:
    return max(0, -int(-(end - start) / settings.bound_step + 1e-9))


def soft_gate(ratio: Ratio, advantage: Tensor, settings: TrustSettings) -> Tensor:
    """SAPO: r times the derivative of the gate (4 / tau) sigmoid(tau (r - 1)). advantage [T] -> [T]."""
    tau = torch.where(advantage > 0, settings.gate_positive, settings.gate_negative)
    gate = torch.sigmoid(tau * (ratio.value - 1))
    return 4 * gate * (1 - gate) * ratio.value * ratio.inside


def sequence_gamma(tokens: Tokens, log_ratio: Tensor, advantage: Tensor, settings: TrustSettings) -> Tensor:
    """VESPO: phi(w) = exp(decay + power log w - decay w) of the trajectory's product w of ratios, phi(1) = 1.

    log_ratio [T] is that of tokens, advantage [T] -> [T].
    """
    bounded = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    log_weight = tokens.sum_trajectory(bounded).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)[tokens.trajectory]
    up = advantage >= 0
    power = torch.where(up, settings.power_positive, settings.power_negative)
    decay = torch.where(up, settings.decay_positive, settings.decay_negative)
    return (decay + power * log_weight - decay * log_weight.exp()).exp()


def inverted(ratio: Ratio, advantage: Tensor, settings: TrustSettings) -> Tensor:
    """ASPO: 1 / r of positive tokens, r of the others, both bounded. advantage [T] -> [T]."""
    weight = torch.where(advantage > 0, 1 / ratio.value, ratio.value)
    return weight.clamp(max=settings.inverse_cap)


def target_ratio(tokens: Tokens, settings: TrustSettings) -> Tensor:
    """GBPO: where each trajectory's ratio ought to go, between the bounds, from where its reward stands in the group.
    [I]"""
    reward, group = tokens.reward, tokens.group_of_trajectory
    weight = tokens.compared.to(reward.dtype)
    size = tokens.sum_group(weight)
    mean = tokens.sum_group(reward * weight) / size.clamp(min=1.0)
    square = tokens.sum_group((reward - mean[group]).square() * weight)
    several = size > 1
    std = torch.where(several, (square / (size - 1).clamp(min=1.0)).sqrt(), 1.0)
    median = torch.where(several, medians(reward, group, tokens.compared, tokens.num_groups), 0.0)
    place = torch.sigmoid((reward - median[group]) / (std + 1e-6)[group] / settings.target_temperature)
    low, high = settings.clip_low, settings.clip_high
    return 1 - low + (low + high) * place


def target_ratio_of_median(tokens: Tokens, advantage: Tensor, settings: TrustSettings) -> Tensor:
    """BPO: where each token's ratio ought to go, from where the return q = A + V that the critic expects behind it
    stands to the median of returns. advantage [T] -> [T]."""
    assert tokens.value_before is not None
    assert tokens.columns.median is not None
    median = torch.where(tokens.finite[tokens.trajectory], tokens.columns.median.double(), 0.0)
    place = torch.sigmoid((advantage + tokens.value_before - median) / settings.target_temperature)
    low, high = settings.clip_low, settings.clip_high
    return 1 - low + (low + high) * place


def medians(values: Tensor, segment: Tensor, counted: Tensor, num_segments: int) -> Tensor:
    """Median of the counted values of each segment, the mean of the two in the middle; [n] -> [segments].

    segment is non-decreasing. 0 where none is counted.
    """
    values, segment = values[counted], segment[counted]
    order = torch.argsort(values, stable=True)
    ordered = values[order[torch.argsort(segment[order], stable=True)]]
    size = torch.bincount(segment, minlength=num_segments)
    if len(ordered) == 0:
        return values.new_zeros(num_segments)
    begin = size.cumsum(0) - size
    last = len(ordered) - 1
    lower = ordered[(begin + (size - 1).clamp(min=0) // 2).clamp(max=last)]
    upper = ordered[(begin + size // 2).clamp(max=last)]
    return torch.where(size > 0, (lower + upper) / 2, 0.0)


def towards_target(tokens: Tokens, ratio: Ratio, advantage: Tensor, settings: TrustSettings) -> Tensor:
    """GBPO, BPO: kappa of the loss |A| |r - r*|, -sign(A) sign(r - r*) r. advantage [T] -> [T]."""
    if settings.rule == "bpo":
        target = target_ratio_of_median(tokens, advantage, settings)
    else:
        target = target_ratio(tokens, settings)[tokens.trajectory]
    return -advantage.sign() * (ratio.value - target).sign() * ratio.value * ratio.inside


def most_entropy(tokens: Tokens, share: float) -> Tensor:
    """The `share` of each trajectory's tokens, at least one, with the highest entropy. [T] bool"""
    assert tokens.entropy is not None
    return highest(tokens.entropy, tokens.trajectory, tokens.num_trajectories, share)


def highest(values: Tensor, segment: Tensor, num_segments: int, share: float) -> Tensor:
    """The `share` of each segment's rows, rounded up, with the highest values. [rows] -> [rows] bool.

    Of equal values the first count as higher. `segment` is non-decreasing.
    """
    size = torch.bincount(segment, minlength=num_segments)
    begin = size.cumsum(0) - size
    wanted = (size.double() * share - 1e-9).ceil()
    longest = int(size.max()) if num_segments else 0
    if num_segments * longest > LARGEST_PADDING * len(values):  # few segments are much longer than the rest
        order = torch.argsort(values, descending=True, stable=True)
        order = order[torch.argsort(segment[order], stable=True)]  # by segment, then from high to low
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - begin[segment[order]]
        return rank < wanted[segment]
    place = torch.arange(len(values), device=values.device) - begin[segment]
    table = values.new_full((num_segments, longest), -torch.inf)
    table[segment, place] = values
    order = table.argsort(dim=1, descending=True, stable=True)
    among = torch.arange(longest, device=values.device) < wanted[:, None]
    return torch.zeros_like(among).scatter_(1, order, among)[segment, place]


def quantile(values: Tensor, share: float) -> Tensor:
    """Linear quantile [] of values [n], n > 0; of any n, which torch.quantile is not."""
    place = share * (len(values) - 1)
    below = int(place)
    lower = values.kthvalue(below + 1)[0]
    upper = values.kthvalue(min(below + 2, len(values)))[0]
    return lower + (upper - lower) * (place - below)
