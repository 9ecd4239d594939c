"""RMSNorm and rotary embedding for training on a CPU: the same numbers in fewer passes over memory, gradients too.

torch composes both of general operations there, each a pass of its own over all tokens: at 0.4 M parameters they took
more of a training step than half of its products did. Anywhere else (GPU, torch.compile, mixed dtypes) torch's own
serve.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [..., size], weight [size] -> the shape of x."""
    if _usual(x, weight):
        normed: Tensor = _RMSNorm.apply(x, weight, eps)
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in Hugging Face's half-split order. x [tokens, heads, head_dim], cos and sin
    [tokens, 1, head_dim] as from `Decoder.rotation` -> the shape of x."""
    half = x.shape[-1] // 2
    if _usual(x, cos):
        rotated: Tensor = _Rotation.apply(x, cos, sin)
        return rotated
    return x * cos + torch.cat((x[..., half:], x[..., :half]), -1) * sin


def _usual(x: Tensor, other: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == other.dtype and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    """The gradient with respect to x is that of a layer norm whose mean is taken for 0, and what a layer norm takes off
    for its mean added again: torch has one kernel for the former."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        size = x.shape[-1]
        rows, per_row = gradient.reshape(-1, size), scale.reshape(-1, 1)
        found, total, _ = torch.ops.aten.native_layer_norm_backward(
            rows,
            x.reshape(-1, size),
            [size],
            torch.zeros_like(per_row),
            per_row,
            weight,
            None,
            [of_x, of_weight, False],
        )
        if of_x:
            found.add_(per_row * (rows @ weight / size).unsqueeze(1))
            found = found.view(x.shape)
        return (found if of_x else None), (total if of_weight else None), None


class _Rotation(torch.autograd.Function):
    """Backward, it turns the other way: by the sines of the other half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        return _turned(x, cos, sin[..., :half], sin[..., half:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = gradient.shape[-1] // 2
        return _turned(gradient, cos, sin[..., half:], sin[..., :half]), None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x * cos, and to each half the other one times `first`, `second` [tokens, 1, head_dim / 2]."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], first)
    out[..., half:].addcmul_(x[..., :half], second)
    return out
