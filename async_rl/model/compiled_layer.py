"""The parts of a decoder's layer around its attention as one compiled function each, forward and backward, for training
on a CPU.

Operation by operation every intermediate result goes through memory, and the backward pass reads it from there again.
Here a block of rows goes through all of them, products included, while it lies in the processor's cache; norms and
SwiGLU are computed again in the backward pass, so less is kept. Results differ from torch's in the last bits.

Where a layer is not plain (hooks, adapters, biases, sharded or frozen parts of another kind), its tensors are not
float32 on a CPU, there is no compiler, or MKL is not the library that multiplies fastest, its modules serve
(decoder.py).

Shapes: n rows, hidden, inner (of the MLP), heads, kv_heads and size (of a head).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from async_rl_kernels import native, product

CACHED = 1 << 18
"""floats that a block of rows may take: they stay in a core's second-level cache"""
LEAST_BLOCK, MOST_BLOCK = 256, 2048
"""rows; of large weights every block would load the sums of their gradients"""


def serves(x: Tensor, weights: Sequence[Tensor], size: int) -> bool:
    """Whether the functions here serve for a layer of these weights, with heads of `size`, on this input."""
    return (
        product.PREFERS_MKL
        and not torch.is_autocast_enabled("cpu")
        and all(type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous() for weight in weights)
        and max(size, x.shape[-1]) <= native.MOST
        and native.usable(x, *weights)
        and native.gemm() is not None
    )


def compute_before(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, weights: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None, size: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [n, hidden] -> query [n, heads, size], key and value [n, kv_heads, size], as `decoder.before_attention`.

    weights: of the products for query, key and value; norms: of query and key, where there are some.
    """
    made: tuple[Tensor, Tensor, Tensor] = _Before.apply(
        x, cos, sin, norm, *weights, *(norms or (None, None)), size, eps
    )
    return made


def compute_after(
    x: Tensor, out: Tensor, out_weight: Tensor, norm: Tensor, inner: Sequence[Tensor], eps: float
) -> Tensor:
    """x [n, hidden], out [n, heads, size] -> [n, hidden], as `decoder.after_attention`. inner: the weights of the MLP's
    products for gate, up and down."""
    made: Tensor = _After.apply(x, out, out_weight, norm, *inner, eps)
    return made


def block_of(rows: int, widest: int) -> int:
    """Rows that go through together, where the widest weight's gradient has so many numbers."""
    return max(1, min(rows, LEAST_BLOCK if widest <= CACHED else MOST_BLOCK))


class _Before(torch.autograd.Function):
    """x [n, hidden] -> query [n, heads, size], key and value [n, kv_heads, size]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, query_weight: Tensor, key_weight: Tensor,
        value_weight: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, size: int, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rows, x = len(x), _in_rows(x)
        cos, sin = cos.contiguous(), sin.contiguous()
        query, key, value = (x.new_empty(rows, len(w) // size, size) for w in (query_weight, key_weight, value_weight))
        kept = [x, cos, sin, x.new_empty(rows), norm, query_weight, key_weight, value_weight]
        query_in, key_in = query, key
        if query_norm is not None and key_norm is not None:
            query_in, key_in = torch.empty_like(query), torch.empty_like(key)
            kept += [query_norm, key_norm, query_in, key_in]
        ctx.eps, ctx.shapes = eps, (query.shape[1], key.shape[1], size)
        arguments = _before(ctx, kept)
        arguments.query_in, arguments.key_in = query_in.data_ptr(), key_in.data_ptr()
        arguments.query, arguments.key, arguments.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        room = x.new_empty(arguments.block * arguments.hidden)
        arguments.room = room.data_ptr()
        _library().before_forward(arguments)
        ctx.save_for_backward(*kept)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pulls: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        arguments = _before(ctx, kept)
        grads = [_heads_in_rows(pull) for pull in pulls]
        arguments.of_query, arguments.of_key, arguments.of_value = (g.data_ptr() for g in grads)
        arguments.of_query_stride, arguments.of_key_stride, arguments.of_value_stride = (g.stride(0) for g in grads)
        hidden, (heads, kv_heads, size) = arguments.hidden, ctx.shapes
        wanted, threads = ctx.needs_input_grad, arguments.threads
        norms = [_sums(w, threads, needed) for w, needed in zip(kept[4:5], wanted[3:4], strict=True)]
        if len(kept) > 8:
            norms += [_sums(w, threads, needed) for w, needed in zip(kept[8:10], wanted[7:9], strict=True)]
            arguments.query_in, arguments.key_in = kept[10].data_ptr(), kept[11].data_ptr()
            arguments.of_query_norm, arguments.of_key_norm = map(_at, norms[1:])
        weights = [_unwritten(w, len(kept[0])) if n else None for w, n in zip(kept[5:8], wanted[4:7], strict=True)]
        arguments.of_norm = _at(norms[0])
        arguments.of_query_weight, arguments.of_key_weight, arguments.of_value_weight = map(_at, weights)
        of_x = torch.empty_like(kept[0], memory_format=torch.contiguous_format)
        per_row = 2 * hidden + (heads + 2 * kv_heads) * size + max(heads, kv_heads)
        room = of_x.new_empty(arguments.block * per_row)
        arguments.of_x, arguments.room = of_x.data_ptr(), room.data_ptr()
        _library().before_backward(arguments)
        totals = [None if n is None else n.sum(0) for n in norms] + [None] * (3 - len(norms))
        return of_x, None, None, totals[0], *weights, *totals[1:], None, None


def _before(ctx: Any, kept: Sequence[Tensor]) -> native.Before:
    """The arguments that forward and backward have in common."""
    x, cos, sin, scale, norm, query_weight, key_weight, value_weight, *norms = kept
    heads, kv_heads, size = ctx.shapes
    return native.Before(
        gemm=native.gemm(),
        rows=len(x),
        hidden=x.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        block=block_of(len(x), query_weight.numel()),
        threads=torch.get_num_threads(),
        eps=ctx.eps,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        norm=norm.data_ptr(),
        query_weight=query_weight.data_ptr(),
        key_weight=key_weight.data_ptr(),
        value_weight=value_weight.data_ptr(),
        query_norm=norms[0].data_ptr() if norms else None,
        key_norm=norms[1].data_ptr() if norms else None,
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        scale=scale.data_ptr(),
    )


class _After(torch.autograd.Function):
    """x [n, hidden], out [n, heads, size] -> [n, hidden]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, out: Tensor, out_weight: Tensor, norm: Tensor, gate_weight: Tensor, up_weight: Tensor,
        down_weight: Tensor, eps: float,
    ) -> Tensor:  # fmt: skip
        x, out = _in_rows(x), _heads_in_rows(out)
        rows, hidden, inner = len(x), x.shape[1], len(gate_weight)
        middle, y = x.new_empty(rows, hidden), x.new_empty(rows, hidden)
        gate = up = None
        if any(ctx.needs_input_grad):
            gate, up = x.new_empty(rows, inner), x.new_empty(rows, inner)
        ctx.eps = eps
        kept = [out, out_weight, norm, gate_weight, up_weight, down_weight, middle, x.new_empty(rows)]
        arguments = _after(ctx, kept)
        arguments.x, arguments.x_stride = x.data_ptr(), x.stride(0)
        arguments.gate, arguments.up, arguments.y = _at(gate), _at(up), y.data_ptr()
        room = x.new_empty(arguments.block * (hidden + 2 * inner))
        arguments.room = room.data_ptr()
        _library().after_forward(arguments)
        if gate is not None and up is not None:
            ctx.save_for_backward(*kept, gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
        *kept, gate, up = ctx.saved_tensors
        out, out_weight, norm, *inner_weights = kept[:6]
        pull = _in_rows(pull)
        arguments = _after(ctx, kept)
        wanted = ctx.needs_input_grad
        weights = [
            _unwritten(w, len(pull)) if n else None
            for w, n in zip((out_weight, *inner_weights), (wanted[2], *wanted[4:7]), strict=True)
        ]
        of_norm = _sums(norm, arguments.threads, wanted[3])
        of_x, of_out = pull.new_empty(pull.shape), pull.new_empty(out.shape)
        arguments.gate, arguments.up = gate.data_ptr(), up.data_ptr()
        arguments.of_y, arguments.of_y_stride = pull.data_ptr(), pull.stride(0)
        arguments.of_x, arguments.of_out, arguments.of_norm = of_x.data_ptr(), of_out.data_ptr(), _at(of_norm)
        (
            arguments.of_out_weight,
            arguments.of_gate_weight,
            arguments.of_up_weight,
            arguments.of_down_weight,
        ) = map(_at, weights)
        room = pull.new_empty(arguments.block * (2 * arguments.hidden + 3 * arguments.inner))
        arguments.room = room.data_ptr()
        _library().after_backward(arguments)
        return of_x, of_out, weights[0], None if of_norm is None else of_norm.sum(0), *weights[1:], None


def _after(ctx: Any, kept: Sequence[Tensor]) -> native.After:
    """The arguments that forward and backward have in common."""
    out, out_weight, norm, gate_weight, up_weight, down_weight, middle, scale = kept
    return native.After(
        gemm=native.gemm(),
        rows=len(out),
        hidden=len(out_weight),
        attended=out_weight.shape[1],
        inner=len(gate_weight),
        block=block_of(len(out), gate_weight.numel()),
        threads=torch.get_num_threads(),
        eps=ctx.eps,
        out=out.data_ptr(),
        out_stride=out.stride(0),
        out_weight=out_weight.data_ptr(),
        norm=norm.data_ptr(),
        gate_weight=gate_weight.data_ptr(),
        up_weight=up_weight.data_ptr(),
        down_weight=down_weight.data_ptr(),
        middle=middle.data_ptr(),
        scale=scale.data_ptr(),
    )


def _sums(weight: Tensor, threads: int, needed: bool) -> Tensor | None:
    """Where each thread sums the gradient of a norm's weight."""
    return weight.new_zeros(threads, len(weight)) if needed else None


def _unwritten(weight: Tensor, rows: int) -> Tensor:
    """Memory for the gradient of a weight, which the first block of rows writes, where there is one."""
    return torch.empty_like(weight) if rows else torch.zeros_like(weight)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_in_rows(x: Tensor) -> Tensor:
    """[n, heads, size], the elements of a row contiguous."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _library() -> Any:
    found = native.library()
    assert found is not None
    return found
