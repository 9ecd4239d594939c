"""The definition of each operation in plain torch: slow, obvious, any float dtype, with autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of `targets`, entropy, and sum of squared probabilities of softmax(hidden @ weight.T / T).

    hidden [tokens, hidden], weight [vocabulary, hidden], targets [tokens] int64; answers three [tokens].
    """
    logits = hidden @ weight.T / temperature  # [tokens, vocabulary]
    log_probs = torch.log_softmax(logits, dim=-1)
    probs = log_probs.exp()
    chosen = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return chosen, -(probs * log_probs).sum(-1), probs.square().sum(-1)


def segmented_weight_grad(
    activations: Tensor, gradients: Tensor, lengths: Sequence[int], multipliers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the weight gradients G_i = sum_{t in i} g_t a_t^T of packed segments: |G_i|^2, sum G_i, sum m_i G_i.

    activations [rows, in], gradients [rows, out] of a linear layer's output, lengths of the segments in
    rows, multipliers [segments]; answers [segments], [out, in], [out, in].
    """
    of_segment = [
        g.T @ a for a, g in zip(activations.split(list(lengths)), gradients.split(list(lengths)), strict=True)
    ]
    each = torch.stack(of_segment)  # [segments, out, in]
    return each.square().sum((1, 2)), each.sum(0), torch.einsum("s,soi->oi", multipliers, each)


def segmented_embedding_grad(
    gradients: Tensor, tokens: Tensor, lengths: Sequence[int], vocabulary: int
) -> Tensor:  # [segments, vocabulary, width]
    """Each segment's gradient of an embedding, from its outputs' gradients [rows, width]."""
    out = gradients.new_zeros(len(lengths), vocabulary, gradients.shape[1])
    row = 0
    for segment, length in enumerate(lengths):
        for _ in range(length):
            out[segment, tokens[row]] += gradients[row]
            row += 1
    return out


def logit_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, *, temperature: float = 1.0
) -> Tensor:  # [rows, vocabulary]
    """d(-sum_t c_t log pi_t) / d(hidden @ weight.T) = c_t (pi_t - onehot) / temperature."""
    pi = torch.softmax(hidden @ weight.T / temperature, dim=-1)
    onehot = torch.nn.functional.one_hot(targets, weight.shape[0]).to(pi.dtype)
    return coefficients[:, None] * (pi - onehot) / temperature


LARGEST_LOG_RATIO = 20.0
"""log-ratios are clamped to this before exp"""


def segment_ratio(
    log_ratio: Tensor,
    advantage: Tensor,
    share: Tensor,
    turn_lengths: Sequence[int],
    turns: Sequence[int],
    *,
    level: str,
    pool: str,
    rule: str,
    gradient: str = "unit",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    cap: float = 8.0,
    low: float = 0.5,
    high: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ratio, was it clipped, and coefficient of every token; sum of the log-ratios of each turn and trajectory.

    The loss of a token is -share * advantage * (what the rule makes of its unit's ratio); a coefficient is its
    derivative by -log pi. log_ratio, advantage, share [tokens], turn_lengths [turns] in tokens, turns
    [trajectories], how many of the turns each has. The choices are those of segment_ratio.Rule.
    """
    turn_sum = torch.stack([log_ratio[:0].sum(), *(part.sum() for part in log_ratio.split(list(turn_lengths)))])[1:]
    trajectory_sum = torch.stack([turn_sum[:0].sum(), *(part.sum() for part in turn_sum.split(list(turns)))])[1:]

    def numbers(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=log_ratio.device)

    def repeated(counts: Tensor) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    per_turn = numbers(turn_lengths)
    per_trajectory = numbers([0] * len(turns)).index_add(0, repeated(numbers(turns)), per_turn)
    units, lengths = {
        "token": (numbers(range(len(log_ratio))), numbers([1] * len(log_ratio))),
        "turn": (repeated(per_turn), per_turn),
        "sequence": (repeated(per_trajectory), per_trajectory),
    }[level]
    divisor = (lengths.clamp(min=1) if pool == "mean" else torch.ones_like(lengths)).to(log_ratio.dtype)

    def over_unit(values: Tensor) -> Tensor:
        return (values.new_zeros(len(lengths)).index_add(0, units, values) / divisor)[units]

    log_unit = over_unit(log_ratio)
    ratio = log_unit.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    through = gradient == "unit" and rule in ("none", "ppo")
    weight = torch.where(log_unit.abs() <= LARGEST_LOG_RATIO, ratio, 0.0) if through else ratio
    clipped = torch.zeros_like(ratio, dtype=torch.bool)
    match rule:
        case "ppo":
            clipped = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))
            if dual_clip > 0:
                clipped |= (advantage < 0) & (ratio > dual_clip)
            weight = torch.where(clipped, 0.0, weight)
        case "truncate":
            weight = ratio.clamp(max=cap)
        case "interval":
            weight = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
        case "cispo":
            weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    if rule in ("truncate", "interval", "cispo"):
        clipped = weight != ratio
    coefficient = share * weight * advantage
    return ratio, clipped, over_unit(coefficient) if through else coefficient, turn_sum, trajectory_sum
