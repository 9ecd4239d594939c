"""A linear layer whose products take the faster way on a CPU (async_rl_kernels.product)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from async_rl_kernels.product import linear, worthwhile


class Linear(nn.Linear):
    """`nn.Linear` whose products, forward and backward, take the faster way."""

    def forward(self, x: Tensor) -> Tensor:
        # torch's compiler takes oneDNN's product of a weight that changes for one of a constant, and fails
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not worthwhile(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        return _Product.apply(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if of_x else None,
            linear(grad.t(), x.t()) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def add_linear(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + features @ weight.T + bias, without autograd. x [rows, out], features [rows, in]."""
    if worthwhile(features, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(features, x, weight, bias, "add")
    out = torch.addmm(x, features, weight.t())
    return out if bias is None else out.add_(bias)
