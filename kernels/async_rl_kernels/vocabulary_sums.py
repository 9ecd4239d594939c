"""Sums over the vocabulary that a softmax is made of, so that parts of a vocabulary can be put together.

A part is a tile of one matrix, or what another rank holds: both are combined by the same function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
