"""Layers of a decoder as one function, forward and backward, for training on a CPU among the rows of a tree.

A function for each part of a layer writes its results to memory, where the next function reads them, and each call
costs a few dozen microseconds of Python. Here some rows, whole trees, go through all layers before the next rows do
(stack.c calls the functions of compiled_layer and merged_attention). Large weights leave no room for rows in the
caches: then the caller passes one layer at a time, and the backward pass gives memory back layer by layer.

Shapes: n rows, hidden, inner (of the MLP), heads, kv_heads and size (of a head).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from async_rl.model.compiled_layer import block_of
from async_rl.model.merged_attention import CompiledParts
from async_rl_kernels import native

WEIGHTS = 11
"""of a layer: norm, query, key, value, query norm and key norm (or None), output, second norm, gate, up, down"""
NORMS = (0, 4, 5, 7)
"""those of them whose gradient each thread sums for itself"""
KEPT = 13
"""results of a layer that its backward pass reads, as in stack.c"""
LINE = 16
"""floats of a line of a cache"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Division:
    """How rows are divided into parts that go through the layers one after the other."""

    parts: np.ndarray  # [count + 1, 3] int64: row, run and asked-for row with which each begins; the end
    runs: np.ndarray  # [runs, 3] int64: begin, end and parent, counted from the part's beginning
    longest: int
    asked: np.ndarray | None  # int64, rows behind the last layer, rising; None: all
    block: int

    @property
    def count(self) -> int:
        return len(self.parts) - 1

    @property
    def widest(self) -> int:
        return int(np.diff(self.parts[:, 0]).max())


def divide(trees: CompiledParts, rows: int, asked: Tensor | None, widest: int) -> Division | None:
    """None where rows of a tree do not lie together or asked-for rows do not rise. widest: numbers of the widest
    weight (compiled_layer.block_of)."""
    runs, wanted = trees.runs.numpy(), None if asked is None else asked.numpy()
    begins = runs[:, 0]
    if rows == 0 or begins[0] or (begins[1:] != runs[:-1, 1]).any() or runs[-1, 1] != rows:
        return None
    if wanted is not None and (len(wanted) == 0 or (wanted[1:] < wanted[:-1]).any()):
        return None
    enough, firsts = block_of(rows, widest), [0]
    for run in np.flatnonzero(runs[:, 2] < 0).tolist():
        if begins[run] - begins[firsts[-1]] >= enough and rows - begins[run] >= enough // 2:
            firsts.append(run)
    bounds = np.append(begins[firsts], rows)
    taken = bounds if wanted is None else np.searchsorted(wanted, bounds)
    of_run = np.repeat(np.arange(len(firsts)), np.diff([*firsts, len(runs)]))
    own = runs.copy()
    own[:, :2] -= bounds[of_run, None]
    own[:, 2] = np.where(own[:, 2] < 0, -1, own[:, 2] - np.array(firsts)[of_run])
    most = int(np.diff(bounds).max())
    return Division(
        parts=np.ascontiguousarray(np.stack((bounds, [*firsts, len(runs)], taken), 1)),
        runs=own,
        longest=trees.longest,
        asked=wanted,
        block=most if most <= 2 * enough else enough,
    )


def compute_layers(
    x: Tensor, cos: Tensor, sin: Tensor, division: Division, weights: Sequence[Sequence[Tensor | None]], size: int,
    eps: float,
) -> Tensor:  # fmt: skip
    """x [n, hidden], cos and sin [n, 1, size] -> [n, hidden] behind these layers, or of the asked-for rows.

    weights: WEIGHTS of each layer, as compiled_layer.serves takes them.
    """
    made: Tensor = _Stack.apply(x, cos, sin, division, size, eps, *(w for layer in weights for w in layer))
    return made


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, division: Division, size: int, eps: float,
        *weights: Tensor | None,
    ) -> Tensor:  # fmt: skip
        x, cos, sin = (t.contiguous() for t in (x, cos, sin))
        keeps = any(ctx.needs_input_grad)
        sizes = _Sizes.of(x, weights, size, division)
        kept, places = _kept(x, sizes, keeps)
        y = x.new_empty(sizes.taken, sizes.hidden)
        places[-1, KEPT - 1] = y.data_ptr()
        arguments, alive = _arguments(x, cos, sin, division, sizes, eps, weights, places, [None] * len(weights))
        _call("stack_forward", arguments)
        del alive
        if keeps:
            ctx.save_for_backward(x, cos, sin, *weights, *kept)
            ctx.division, ctx.size, ctx.eps = division, size, eps
            ctx.offsets = places - np.array([[memory.data_ptr()] for memory in kept])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, *rest = ctx.saved_tensors
        number = len(ctx.needs_input_grad) - 6
        weights, kept = rest[:number], rest[number:]
        division, pull = ctx.division, pull.contiguous()
        sizes = _Sizes.of(x, weights, ctx.size, division)
        wanted = ctx.needs_input_grad[6:]
        written = division.parts[1, 2] > 0  # by the first part
        threads, gradients = torch.get_num_threads(), list[Tensor | None]()
        for number, (weight, needed) in enumerate(zip(weights, wanted, strict=True)):
            if weight is None or not needed:
                gradients.append(None)
            elif number % WEIGHTS in NORMS:
                gradients.append(weight.new_zeros(threads, len(weight)))
            else:
                gradients.append(torch.empty_like(weight) if written else torch.zeros_like(weight))
        places = ctx.offsets + np.array([[memory.data_ptr()] for memory in kept])
        arguments, alive = _arguments(x, cos, sin, division, sizes, ctx.eps, weights, places, gradients)
        of_x = torch.empty_like(x)
        arguments.of_y, arguments.of_x = pull.data_ptr(), of_x.data_ptr()
        _call("stack_backward", arguments)
        del alive
        totals = [g.sum(0) if g is not None and number % WEIGHTS in NORMS else g for number, g in enumerate(gradients)]
        return of_x, None, None, None, None, None, *totals


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    rows: int
    taken: int
    hidden: int
    heads: int
    kv_heads: int
    size: int
    inner: int
    layers: int
    normed: bool

    @classmethod
    def of(cls, x: Tensor, weights: Sequence[Tensor | None], size: int, division: Division) -> _Sizes:
        query, key, gate = weights[1], weights[2], weights[8]
        assert query is not None
        assert key is not None
        assert gate is not None
        rows, hidden = x.shape
        return cls(
            rows=rows,
            taken=rows if division.asked is None else len(division.asked),
            hidden=hidden,
            heads=len(query) // size,
            kv_heads=len(key) // size,
            size=size,
            inner=len(gate),
            layers=len(weights) // WEIGHTS,
            normed=weights[4] is not None,
        )

    def kept(self, last: bool) -> list[int]:
        """Floats of each result of a layer. Without norms queries before them are the queries; what the last layer
        makes is the caller's."""
        attended, keys = self.rows * self.heads * self.size, self.rows * self.kv_heads * self.size
        behind = self.taken if last else self.rows
        return [
            self.rows, attended if self.normed else 0, keys if self.normed else 0, attended, keys, keys, attended,
            self.rows * self.heads, behind * self.hidden, behind, behind * self.inner, behind * self.inner,
            0 if last else self.rows * self.hidden,
        ]  # fmt: skip


def _kept(x: Tensor, sizes: _Sizes, keeps: bool) -> tuple[list[Tensor], np.ndarray]:
    """(memory for the results of each layer, their addresses [layers, KEPT]). Not kept: all layers use the same."""
    floats = np.array([sizes.kept(layer == sizes.layers - 1) for layer in range(sizes.layers)])
    if not keeps:
        floats[:] = floats.max(0)
    floats = -(-floats // LINE) * LINE
    ends = floats.cumsum(1)
    # not all at once: the C library takes much memory from the system anew each time
    memory = [x.new_empty(int(size)) for size in ends[: sizes.layers if keeps else 1, -1]]
    places = np.array([m.data_ptr() for m in memory])[:, None] + 4 * (ends - floats)
    if not sizes.normed:
        places[:, 1:3] = places[:, 3:5]
    return memory, places


def _arguments(
    x: Tensor, cos: Tensor, sin: Tensor, division: Division, sizes: _Sizes, eps: float,
    weights: Sequence[Tensor | None], places: np.ndarray, gradients: Sequence[Tensor | None],
) -> tuple[native.Stack, object]:  # fmt: skip
    """(the argument, what must live as long)"""
    shape = sizes.layers, WEIGHTS
    of_weights, of_gradients = (
        np.array([0 if t is None else t.data_ptr() for t in every], np.int64).reshape(shape)
        for every in (weights, gradients)
    )
    layers = np.ascontiguousarray(np.concatenate((of_weights, places, of_gradients), 1))
    asked = None if division.asked is None else np.ascontiguousarray(division.asked)
    arguments = native.Stack(
        gemm=native.gemm(),
        rows=sizes.rows,
        hidden=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        size=sizes.size,
        inner=sizes.inner,
        layers=sizes.layers,
        block=division.block,
        widest=division.widest,
        threads=torch.get_num_threads(),
        eps=eps,
        x=x.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        parts=division.parts.ctypes.data,
        count=division.count,
        runs=division.runs.ctypes.data,
        longest=division.longest,
        scale=sizes.size**-0.5,
        asked=None if asked is None else asked.ctypes.data,
        layer=layers.ctypes.data,
    )
    room = x.new_empty(_library().stack_room(arguments))
    arguments.room = room.data_ptr()
    return arguments, (layers, asked, room)


def _call(name: str, arguments: native.Stack) -> None:
    if getattr(_library(), name)(arguments):
        raise MemoryError(f"attention of {arguments.rows} rows finds no memory")


def _library() -> ctypes.CDLL:
    found = native.library()
    assert found is not None
    return found
