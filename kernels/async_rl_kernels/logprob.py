"""Log-probs of given tokens from hidden states and the head, without a [tokens, vocabulary] matrix.

The logits of a chunk of tokens exist at a time, in forward and again in backward (recomputed): memory is
`chunk x vocabulary` instead of `tokens x vocabulary`, for one more head product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""logits held at a time (float32: 16 MiB)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbs:
    """float32 (float64 for float64 input) columns, one row a token."""

    log_prob: Tensor  # [tokens], differentiable
    entropy: Tensor  # [tokens], differentiable
    prob_square_sum: Tensor  # [tokens], no gradient


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> LogProbs:
    """Log pi of `targets` under softmax(hidden @ weight.T / temperature), entropy and sum of pi^2.

    hidden [tokens, hidden], weight [vocabulary, hidden] of one float dtype, targets [tokens] int64.
    Definition: reference.linear_logprob. Raises ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    chunk = max(1, chunk_elements // weight.shape[0])
    log_prob, entropy, square = _LinearLogProb.apply(hidden, weight, targets, 1.0 / temperature, chunk)
    return LogProbs(log_prob=log_prob, entropy=entropy, prob_square_sum=square)


def _log_softmax(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    logits = hidden @ weight.T
    if logits.dtype != torch.float64:
        logits = logits.float()
    return torch.log_softmax(logits.mul_(scale), dim=-1)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        log_prob, entropy, square = (hidden.new_empty(tokens, dtype=dtype) for _ in range(3))
        # A batch that fits one chunk keeps its probabilities; longer ones recompute them.
        single = tokens <= chunk
        kept = None
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            logp = _log_softmax(hidden[part], weight, scale)
            probs = logp.exp()
            log_prob[part] = logp.gather(-1, targets[part, None]).squeeze(-1)
            entropy[part] = torch.linalg.vecdot(probs, logp).neg_()
            square[part] = torch.linalg.vecdot(probs, probs)
            kept = probs if single else None
        ctx.scale, ctx.chunk, ctx.single = scale, chunk, single
        ctx.save_for_backward(hidden, weight, targets, entropy, kept)
        ctx.mark_non_differentiable(square)
        ctx.set_materialize_grads(False)
        return log_prob, entropy, square

    @staticmethod
    def backward(
        ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, entropy, kept = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        if grad_log_prob is None and grad_entropy is None:
            return None, None, None, None, None
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            probs = kept if ctx.single else _log_softmax(hidden[part], weight, ctx.scale).exp_()
            grad_logits = _grad_logits(
                probs,
                targets[part],
                entropy[part],
                None if grad_log_prob is None else grad_log_prob[part],
                None if grad_entropy is None else grad_entropy[part],
            )
            grad_logits = grad_logits.mul_(ctx.scale).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if need_weight:
                product = grad_logits.T @ hidden[part]
                # several chunks are added up in float32, whatever the inputs are
                grad_weight = product if ctx.single else _add(grad_weight, product)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _add(total: Tensor | None, product: Tensor) -> Tensor:
    if total is None:
        return product if product.dtype == torch.float64 else product.float()
    return total.add_(product)


def _grad_logits(
    probs: Tensor, targets: Tensor, entropy: Tensor, grad_log_prob: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """d(loss)/d(scaled logits): g (onehot - pi) for log-probs, -h pi (log pi + H) for entropy."""
    if grad_log_prob is None:
        out = torch.zeros_like(probs)
    else:
        out = probs * -grad_log_prob[:, None]
        out.scatter_add_(-1, targets[:, None], grad_log_prob[:, None].to(out.dtype))
    if grad_entropy is not None:
        log_probs = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
        out -= grad_entropy[:, None] * probs * (log_probs + entropy[:, None])
    return out
