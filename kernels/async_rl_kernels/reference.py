"""The definition of each operation in plain torch: slow, obvious, any float dtype, with autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, cap: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of `targets`, entropy, and sum of squared probabilities of softmax(hidden @ weight.T / T).

    hidden [tokens, hidden], weight [vocabulary, hidden], targets [tokens] int64; returns three [tokens]. With a cap
    [tokens] logits x become cap * tanh(x / cap) before they are divided by the temperature.
    """
    logits = hidden @ weight.T  # [tokens, vocabulary]
    if cap is not None:
        logits = cap[:, None] * torch.tanh(logits / cap[:, None])
    logits = logits / temperature
    log_probs = torch.log_softmax(logits, dim=-1)
    probs = log_probs.exp()
    chosen = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return chosen, -(probs * log_probs).sum(-1), probs.square().sum(-1)


def min_p_log_prob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, share: float, temperature: float = 1.0
) -> Tensor:
    """Log-prob of `targets` when only tokens of at least `share` of the largest probability are kept; -inf for others.

    hidden [tokens, hidden], weight [vocabulary, hidden], targets [tokens] int64; returns [tokens].
    """
    probs = torch.softmax(hidden @ weight.T / temperature, dim=-1)
    kept = torch.where(probs >= share * probs.amax(-1, keepdim=True), probs, 0.0)
    return (kept / kept.sum(-1, keepdim=True)).gather(-1, targets[:, None]).squeeze(-1).log()


def segmented_weight_grad(
    activations: Tensor, gradients: Tensor, lengths: Sequence[int], multipliers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """|G_i|^2 [segments], sum G_i [out, in] and sum m_i G_i [out, in], with G_i = sum_{t in i} g_t a_t^T.

    G_i are the weight gradients of packed segments. activations [rows, in], gradients [rows, out] of a linear layer's
    output, lengths of the segments in rows, multipliers [segments].
    """
    of_segment = [
        g.T @ a for a, g in zip(activations.split(list(lengths)), gradients.split(list(lengths)), strict=True)
    ]
    each = torch.stack(of_segment)  # [segments, out, in]
    return each.square().sum((1, 2)), each.sum(0), torch.einsum("s,soi->oi", multipliers, each)


def segmented_embedding_grad(gradients: Tensor, tokens: Tensor, lengths: Sequence[int], vocabulary: int) -> Tensor:
    """Each segment's gradient of an embedding, [segments, vocabulary, width].

    gradients [rows, width] of its outputs, tokens [rows] int64.
    """
    out = gradients.new_zeros(len(lengths), vocabulary, gradients.shape[1])
    row = 0
    for segment, length in enumerate(lengths):
        for _ in range(length):
            out[segment, tokens[row]] += gradients[row]
            row += 1
    return out


def logit_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """d(-sum_t c_t log pi_t) / d(hidden @ weight.T) = c_t (pi_t - onehot) / temperature, [rows, vocabulary].

    hidden [rows, width], weight [vocabulary, width], targets [rows] int64, coefficients [rows].
    """
    pi = torch.softmax(hidden @ weight.T / temperature, dim=-1)
    onehot = torch.nn.functional.one_hot(targets, weight.shape[0]).to(pi.dtype)
    return coefficients[:, None] * (pi - onehot) / temperature
