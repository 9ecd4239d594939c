"""The definition of each operation in plain torch: slow, obvious, any float dtype, with autograd."""

from __future__ import annotations

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
