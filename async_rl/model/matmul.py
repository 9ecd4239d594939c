"""Matrix products on a CPU through oneDNN.

torch sends float32 products to MKL, which on AMD processors stays below half of what oneDNN reaches
with the same weights (measured: 105 against 230 GFLOP/s on one core, 360 rows). oneDNN costs a few
microseconds more a call, so small products stay where they are. `bench/engine.py` shows the effect.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WORTHWHILE = 800_000
"""multiplications from which oneDNN's faster product outweighs its dearer call"""

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """`nn.Linear` whose products, forward and backward, take the faster way."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") or not _worthwhile(x, self.weight):
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without autograd. x [rows, in], weight [out, in]."""
    if _worthwhile(x, weight):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add_linear(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + features @ weight.T + bias, without autograd. x [rows, out], features [rows, in]."""
    if _worthwhile(features, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(features, x, weight, bias, "add")
    out = torch.addmm(x, features, weight.t())
    return out if bias is None else out.add_(bias)


def _worthwhile(x: Tensor, weight: Tensor) -> bool:
    return (
        HAS_ONEDNN
        and x.dim() == 2
        and x.shape[0] * weight.numel() >= WORTHWHILE
        and x.dtype == torch.float32
        and x.device.type == "cpu"
    )
