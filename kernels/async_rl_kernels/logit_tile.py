"""What is done to a tile of logits between two matrix products, in torch operations; `tile_kernels` picks it
on every device but CUDA, where logit_tile_triton does the same in one pass over the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from async_rl_kernels.product import uses_triton

# -------------------- vocabulary sums
# Sums over the vocabulary that a softmax is made of, so that parts of a vocabulary can be put together.
#
# A part is a tile of one matrix, or what another rank holds: both are combined by the same function.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabularySums:
    """Of scaled logits x_j = h . w_j / temperature over some ids j; float32 or float64."""

    columns: Tensor  # [5, tokens], or [5, parts, tokens] before `combined`

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> VocabularySums:
        """Memory to be written."""
        return VocabularySums(columns=torch.empty((5, *shape), dtype=dtype, device=device))

    @property
    def largest(self) -> Tensor:
        """m = max x_j"""
        return self.columns[0]

    @property
    def total(self) -> Tensor:
        """sum exp(x_j - m)"""
        return self.columns[1]

    @property
    def spread(self) -> Tensor:
        """sum exp(x_j - m) (x_j - m)"""
        return self.columns[2]

    @property
    def square(self) -> Tensor:
        """sum exp(x_j - m)^2"""
        return self.columns[3]

    @property
    def chosen(self) -> Tensor:
        """x of the target id, 0 where it is not among the ids"""
        return self.columns[4]

    def part(self, number: int) -> VocabularySums:
        """[parts, tokens] -> [tokens], the same memory"""
        return VocabularySums(columns=self.columns[:, number])

    def rows(self, part: slice) -> VocabularySums:
        """[tokens] -> fewer, the same memory"""
        return VocabularySums(columns=self.columns[:, part])

    def combined(self) -> VocabularySums:
        """[parts, tokens] -> [tokens]"""
        if self.columns.shape[1] == 1:
            return self.part(0)
        largest = self.largest.amax(0)
        lower = self.largest - largest
        factor = lower.exp()
        columns = [
            largest,
            (factor * self.total).sum(0),
            (factor * (self.spread + lower * self.total)).sum(0),
            (factor.square() * self.square).sum(0),
            self.chosen.sum(0),
        ]
        return VocabularySums(columns=torch.stack(columns))

    @property
    def log_normaliser(self) -> Tensor:
        """log sum exp x_j"""
        return self.largest + self.total.log()

    @property
    def log_prob(self) -> Tensor:
        return self.chosen - self.log_normaliser

    @property
    def entropy(self) -> Tensor:
        return self.total.log() - self.spread / self.total

    @property
    def prob_square_sum(self) -> Tensor:
        return self.square / self.total.square()


PIECE_ELEMENTS = 1 << 17
"""logits that go through all operations before the next ones: they stay in the second-level cache"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pull:
    """What a token's logits are pulled by: d(loss)/d(column), and the column where the derivative needs it.
    All [tokens], float32 or better."""

    log_normaliser: Tensor
    log_prob: Tensor
    """d(loss)/d(log-prob)"""
    entropy: tuple[Tensor, Tensor] | None = None
    """d(loss)/d(entropy), entropy"""
    square: tuple[Tensor, Tensor] | None = None
    """d(loss)/d(sum of pi^2), sum of pi^2"""

    def rows(self, part: slice) -> Pull:
        def cut(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if pair is None else (pair[0][part], pair[1][part])

        return Pull(
            log_normaliser=self.log_normaliser[part],
            log_prob=self.log_prob[part],
            entropy=cut(self.entropy),
            square=cut(self.square),
        )


class TileKernels(Protocol):
    """Of a tile `logits` [rows, ids] = hidden . weight, float32 or better, contiguous, which may be overwritten.
    local [rows] int64: the target's column, which may lie outside the tile. scale: 1 / temperature."""

    def sums(self, logits: Tensor, local: Tensor, scale: float, out: VocabularySums) -> None:
        """Write the sums over the ids to `out` [rows]."""

    def gradient(self, logits: Tensor, local: Tensor, scale: float, pull: Pull, dtype: torch.dtype) -> Tensor:
        """d(loss)/d(logits) [rows, ids] in `dtype`."""


class TorchTile:
    def sums(self, logits: Tensor, local: Tensor, scale: float, out: VocabularySums) -> None:
        width = logits.shape[1]
        inside = (local >= 0) & (local < width)
        chosen = logits.gather(1, local.clamp(0, width - 1)[:, None]).squeeze(1)
        out.chosen.copy_(torch.where(inside, chosen * scale, 0.0))
        for rows in pieces(logits):
            x = logits[rows]
            if scale != 1.0:
                x = x.mul_(scale)
            torch.amax(x, 1, out=out.largest[rows])
            x = x.sub_(out.largest[rows, None])
            weight = x.exp()
            torch.sum(weight, 1, out=out.total[rows])
            out.spread[rows] = torch.linalg.vecdot(weight, x)
            out.square[rows] = torch.linalg.vecdot(weight, weight)

    def gradient(self, logits: Tensor, local: Tensor, scale: float, pull: Pull, dtype: torch.dtype) -> Tensor:
        """pi_j (-g - e (log pi_j + H) + 2 q (pi_j - S)) and g more at the target, times the scale."""
        for rows in pieces(logits):
            x, of = logits[rows], pull.rows(rows)
            if scale != 1.0:
                x = x.mul_(scale)
            x = x.sub_(of.log_normaliser[:, None])
            if of.entropy is None and of.square is None:
                x.exp_().mul_((-scale * of.log_prob)[:, None])
                continue
            probs, factor = x.exp(), (-of.log_prob)[:, None]
            if of.entropy is not None:
                factor = factor - of.entropy[0][:, None] * (x + of.entropy[1][:, None])
            if of.square is not None:
                factor = factor + 2 * of.square[0][:, None] * (probs - of.square[1][:, None])
            torch.mul(probs, factor, out=x)
            x.mul_(scale)
        width = logits.shape[1]
        inside = (local >= 0) & (local < width)
        at_target = torch.where(inside, scale * pull.log_prob, 0.0).to(logits.dtype)
        logits.scatter_add_(1, local.clamp(0, width - 1)[:, None], at_target[:, None])
        return logits.to(dtype)


def pieces(tile: Tensor) -> list[slice]:
    """Rows of about PIECE_ELEMENTS."""
    step = max(1, PIECE_ELEMENTS // tile.shape[1])
    return [slice(start, start + step) for start in range(0, len(tile), step)]


def tile_kernels(hidden: Tensor) -> TileKernels:
    """Triton on CUDA, torch operations elsewhere."""
    if uses_triton(hidden):
        from async_rl_kernels.logit_tile_triton import TritonTile

        return TritonTile()
    return TorchTile()
