"""Rows that stand for several tokens: taken once for each of them, and gradients of the copies added up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Repeats:
    """Rows taken several times, with a gradient that adds the copies of a row in a fixed order and in float32 or
    better."""

    def __init__(self, rows: Tensor, num_rows: int) -> None:
        """rows: [copies] int64, each row at least once."""
        self.rows = rows
        self.order = torch.argsort(rows, stable=True)  # [copies]: those of the first row, of the second, ...
        counts = torch.bincount(rows, minlength=num_rows)
        self.first = counts.cumsum(0) - counts  # [rows]
        self.one = self.order[self.first]  # [rows]: a copy of each, the first

    def take(self, tensor: Tensor) -> Tensor:
        """[rows, ...] -> [copies, ...]"""
        out: Tensor = _Take.apply(tensor, self)
        return out

    def sums(self, copies: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum over the copies of each row, each times its weight [copies]: [copies, ...] -> [rows, ...], float32 or
        better."""
        flat = copies.flatten(1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        scale = None if weights is None else weights[self.order].to(flat.dtype)
        found = F.embedding_bag(self.order, flat, self.first, mode="sum", per_sample_weights=scale)
        return found.unflatten(1, copies.shape[1:])


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, repeats: Repeats) -> Tensor:
        ctx.repeats = repeats
        return tensor.index_select(0, repeats.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.repeats.sums(gradient).to(gradient.dtype), None
