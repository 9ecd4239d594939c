"""Log-probs of given tokens from hidden states and the head, without a [tokens, vocabulary] matrix.

A tile of the logits exists at a time, in forward and again in backward (computed again: one more product).
head_pass has the loops, logit_tile what is done to a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from async_rl_kernels.head_pass import Tiles, head_gradients, head_sums, tiles_for
from async_rl_kernels.logit_tile import Pull, TileKernels, VocabularySums, tile_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbs:
    """float32 (float64 for float64 input) columns, one row a token, all differentiable."""

    log_prob: Tensor  # [tokens]
    entropy: Tensor  # [tokens]
    prob_square_sum: Tensor  # [tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A head cut along the vocabulary over the ranks of a group (tensor parallel).

    Every rank has the same hidden states and targets and gives its own rows of the weight; every rank gets the
    columns of the whole vocabulary, the whole gradient of the hidden states and that of its own rows.
    """

    start: int
    """id of this rank's first row"""
    group: dist.ProcessGroup

    def combined(self, sums: VocabularySums) -> VocabularySums:
        """Over all ranks."""
        mine = sums.columns.contiguous()
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, mine, group=self.group)
        return VocabularySums(columns=torch.stack(every, 1)).combined()

    def summed(self, gradient: Tensor) -> Tensor:
        """Over all ranks, in float32 or better."""
        total = gradient if gradient.dtype == torch.float64 else gradient.float()
        total = total.contiguous()
        dist.all_reduce(total, group=self.group)
        return total.to(gradient.dtype)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    products: torch.dtype | None = None,
    shard: Shard | None = None,
    tiles: Tiles | None = None,
    kernels: TileKernels | None = None,
) -> LogProbs:
    """Log pi of `targets` under softmax(hidden @ weight.T / temperature), entropy and sum of pi^2.

    hidden [tokens, hidden], weight [vocabulary, hidden] of one float dtype, targets [tokens] int64. products: dtype
    that both are rounded to, tile by tile, before they are multiplied (sums stay float32). shard: weight is this
    rank's part of the vocabulary. tiles, kernels: how and with what, when not as the device needs it.
    Definition: reference.linear_logprob. Raises ValueError for a temperature that is not positive, IndexError for
    a target outside the vocabulary (on CUDA that is not looked at).
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if shard is None and len(targets) and targets.device.type == "cpu":
        least, most = targets.aminmax()
        if least < 0 or most >= len(weight):
            raise IndexError(f"a target is {int(least if least < 0 else most)}, the vocabulary has {len(weight)} ids")
    tiles = tiles or tiles_for(hidden, weight)
    kernels = kernels or tile_kernels(hidden)
    columns = _LinearLogProb.apply(hidden, weight, targets, 1.0 / temperature, products, shard, tiles, kernels)
    log_prob, entropy, square = columns
    return LogProbs(log_prob=log_prob, entropy=entropy, prob_square_sum=square)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        products: torch.dtype | None,
        shard: Shard | None,
        tiles: Tiles,
        kernels: TileKernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        local = targets if shard is None else targets - shard.start
        keep = any(ctx.needs_input_grad)
        sums, kept = head_sums(hidden, weight, local, scale, tiles, kernels, products=products, keep_single=keep)
        if shard is not None:
            sums = shard.combined(sums)
        entropy, square = sums.entropy, sums.prob_square_sum
        ctx.how = scale, products, shard, tiles, kernels
        ctx.save_for_backward(hidden, weight, local, sums.log_normaliser, entropy, square, kept)
        ctx.set_materialize_grads(False)
        return sums.log_prob, entropy, square

    @staticmethod
    def backward(
        ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, grad_square: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, local, log_normaliser, entropy, square, kept = ctx.saved_tensors
        scale, products, shard, tiles, kernels = ctx.how
        if grad_log_prob is None and grad_entropy is None and grad_square is None:
            return (None,) * 8
        pull = Pull(
            log_normaliser=log_normaliser,
            log_prob=torch.zeros_like(entropy) if grad_log_prob is None else grad_log_prob,
            entropy=None if grad_entropy is None else (grad_entropy, entropy),
            square=None if grad_square is None else (grad_square, square),
        )
        of_hidden, of_weight, *_ = ctx.needs_input_grad
        grad_hidden, grad_weight = head_gradients(
            hidden, weight, local, scale, pull, tiles, kernels,
            need_hidden=of_hidden, need_weight=of_weight, products=products,
            kept=None if kept is None else kept.clone(),
        )  # fmt: skip
        if shard is not None and grad_hidden is not None:
            grad_hidden = shard.summed(grad_hidden)
        return grad_hidden, grad_weight, None, None, None, None, None, None
