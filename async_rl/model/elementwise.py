"""RMSNorm, rotary embedding and SwiGLU for training on a CPU: the same numbers in fewer passes over memory, gradients
too.

torch composes them of general operations there, each a pass of its own over all tokens: at 0.4 M parameters they took
more of a training step than half of its products did. Where there is a compiler each is one pass
(async_rl_kernels.native), else a few of torch's. Anywhere else (GPU, torch.compile, mixed dtypes) torch's own serve.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from async_rl_kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [..., size], weight [size] -> the shape of x."""
    if _usual(x, weight):
        compiled = x.shape[-1] <= native.MOST and native.usable(x, weight)
        normed: Tensor = (_CompiledNorm if compiled else _RMSNorm).apply(x, weight, eps)
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in Hugging Face's half-split order. x [tokens, heads, head_dim], cos and sin
    [tokens, 1, head_dim] as from `Decoder.rotation` -> the shape of x."""
    half = x.shape[-1] // 2
    if _usual(x, cos):
        rotated: Tensor = (_CompiledRotation if native.usable(x, cos) else _Rotation).apply(x, cos, sin)
        return rotated
    return x * cos + torch.cat((x[..., half:], x[..., :half]), -1) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). gate, up [rows, size] -> the same shape."""
    if _usual(gate, up) and native.usable(gate, up):
        gated: Tensor = _CompiledSwiGLU.apply(gate, up)
        return gated
    return F.silu(gate) * up


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


class _CompiledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        rows, out = x.reshape(-1, size), torch.empty(x.shape)
        scale = torch.empty(len(rows))
        _library().rms_norm(
            rows.data_ptr(), rows.stride(0), weight.data_ptr(), eps, out.data_ptr(), size, scale.data_ptr(), len(rows),
            size, torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        size, threads = x.shape[-1], torch.get_num_threads()
        rows, grads = x.reshape(-1, size), _in_rows(gradient.reshape(-1, size))
        found = torch.empty(x.shape)
        total = torch.zeros(threads, size) if ctx.needs_input_grad[1] else None
        _library().rms_norm_backward(
            grads.data_ptr(), grads.stride(0), rows.data_ptr(), rows.stride(0), weight.data_ptr(), scale.data_ptr(),
            found.data_ptr(), size, None if total is None else total.data_ptr(), len(rows), size, threads, threads,
        )  # fmt: skip
        return found, None if total is None else total.sum(0), None


class _CompiledRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        tokens, heads, size = x.shape
        x = x if x.stride(1) == size else x.contiguous()
        out = torch.empty(x.shape)
        _library().turn_heads(
            x.data_ptr(), x.stride(0), None, None, 0, 0.0, cos.data_ptr(), sin.data_ptr(), size, None, out.data_ptr(),
            heads * size, tokens, heads, size, torch.get_num_threads(),
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        tokens, heads, size = gradient.shape
        if gradient.stride()[1:] != (size, 1):
            gradient = gradient.contiguous()
        out = torch.empty(gradient.shape)
        _library().turn_heads_back(
            gradient.data_ptr(), gradient.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), heads * size,
            tokens, heads, size, torch.get_num_threads(),
        )  # fmt: skip
        return out, None, None


class _CompiledSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        rows, size = gate.shape
        out = torch.empty(gate.shape)
        _library().swiglu(
            gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), out.data_ptr(), size, rows, size,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gradient = _in_rows(gradient)
        rows, size = gate.shape
        of_gate, of_up = torch.empty(gate.shape), torch.empty(gate.shape)
        _library().swiglu_backward(
            gradient.data_ptr(), gradient.stride(0), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0),
            of_gate.data_ptr(), of_up.data_ptr(), size, rows, size, torch.get_num_threads(),
        )  # fmt: skip
        return of_gate, of_up


def _in_rows(tensor: Tensor) -> Tensor:
    """[rows, size], the elements of a row contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _library() -> Any:
    found = native.library()
    assert found is not None
    return found
