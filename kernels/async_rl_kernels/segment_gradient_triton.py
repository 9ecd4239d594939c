"""Per-trajectory weight gradients on CUDA, G_i = sum_{t in i} g_t a_t^T, and their squared norms.

Two kernels form |G_i|^2; counted products decide for each segment (segment_gradient has the formulas):
- `gram_kernel`: sum (A A^T) o (G G^T) over pairs of row blocks on and below the diagonal. Nothing of G_i exists.
- `weight_kernel`: a program owns a tile of [out, in] and walks all rows. The tile of the running G_i is in
  registers; where a segment ends its square sum is written out. The products are those of one ordinary weight
  gradient.
For bfloat16 and float16, whose products the tensor cores do with float32 sums; others stay with torch.
Square sums are written per (segment, tile) and added up afterwards in float64: no atomics, one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from async_rl_kernels.segment_gradient import Segments

GRAM_ROWS = 128
"""rows of a block"""
GRAM_DEPTH = 64
GRAM_OPTIONS = {"num_warps": 8, "num_stages": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTile:
    """Sizes of weight_kernel."""

    out: int
    into: int
    rows: int
    warps: int
    stages: int
    """as Triton counts them: two of them hold block numbers, the others rows"""


NORMS_TILE = WeightTile(out=128, into=256, rows=64, warps=8, stages=6)
"""one accumulator: 128 registers a thread"""
GROUP = 8
"""tiles of `out` that walk one tile of `in` together, so that rows come from the second-level cache"""


@triton.jit
def add_gram(
    total,
    values,
    upper,
    lower,
    end,
    width,
    stride,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """total [ROWS, ROWS] += rows from `upper` on times rows from `lower` on, of values [rows, width] up to `end`."""
    offset = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    above = values + upper.to(tl.int64) * stride + offset[:, None] * stride + depth[None, :]
    below = values + lower.to(tl.int64) * stride + offset[:, None] * stride + depth[None, :]
    in_upper = (upper + offset < end)[:, None]
    in_lower = (lower + offset < end)[:, None]
    for first in range(0, width, DEPTH):
        inside = (first + depth < width)[None, :]
        x = tl.load(above + first, mask=in_upper & inside, other=0.0)
        y = tl.load(below + first, mask=in_lower & inside, other=0.0)
        total = tl.dot(x, tl.trans(y), total)
    return total


@triton.jit
def gram_kernel(
    activations,
    gradients_0,
    gradients_1,
    gradients_2,
    uppers,
    lowers,
    ends,
    out,
    width,
    width_0,
    width_1,
    width_2,
    stride,
    stride_0,
    stride_1,
    stride_2,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """out[pair] = sum over two blocks of rows of (a_s . a_t) (g_s . g_t), twice it below the diagonal."""
    pair = tl.program_id(0)
    upper = tl.load(uppers + pair)
    lower = tl.load(lowers + pair)
    end = tl.load(ends + pair)
    inputs = tl.zeros((ROWS, ROWS), tl.float32)
    inputs = add_gram(inputs, activations, upper, lower, end, width, stride, ROWS, DEPTH)
    outputs = tl.zeros((ROWS, ROWS), tl.float32)
    outputs = add_gram(outputs, gradients_0, upper, lower, end, width_0, stride_0, ROWS, DEPTH)
    if LAYERS > 1:
        outputs = add_gram(outputs, gradients_1, upper, lower, end, width_1, stride_1, ROWS, DEPTH)
    if LAYERS > 2:
        outputs = add_gram(outputs, gradients_2, upper, lower, end, width_2, stride_2, ROWS, DEPTH)
    value = tl.sum(tl.reshape(inputs * outputs, (ROWS * ROWS,)), 0)
    tl.store(out + pair, tl.where(upper == lower, value, 2 * value))


@triton.jit
def weight_kernel(
    gradients,
    activations,
    starts,
    stops,
    finished,
    squares,
    blocks,
    out_width,
    in_width,
    gradients_stride,
    activations_stride,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of the weight: squares[segment, tile] = |tile of G_segment|^2.

    starts, stops [blocks]: rows of each block; finished [blocks]: the segment that ends with it, or -1.
    squares [segments, tiles] float32.
    """
    tile = tl.program_id(0)
    down, across = tl.cdiv(out_width, OUT), tl.cdiv(in_width, IN)
    band = tile // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    inside_band = tile - band * GROUP * across
    out_column = (band * GROUP + inside_band % height) * OUT + tl.arange(0, OUT)
    in_column = (inside_band // height) * IN + tl.arange(0, IN)
    row = tl.arange(0, ROWS)
    g_tile = gradients + row[:, None] * gradients_stride + out_column[None, :]
    a_tile = activations + row[:, None] * activations_stride + in_column[None, :]
    has_g = (out_column < out_width)[None, :]
    has_a = (in_column < in_width)[None, :]

    current = tl.zeros((OUT, IN), tl.float32)
    for block in range(blocks):
        start = tl.load(starts + block)
        here = (start + row < tl.load(stops + block))[:, None]
        g = tl.load(g_tile + start.to(tl.int64) * gradients_stride, mask=here & has_g, other=0.0)
        a = tl.load(a_tile + start.to(tl.int64) * activations_stride, mask=here & has_a, other=0.0)
        current = tl.dot(tl.trans(g), a, current)
        segment = tl.load(finished + block)
        if segment >= 0:
            square = tl.sum(tl.reshape(current * current, (OUT * IN,)), 0)
            tl.store(squares + segment.to(tl.int64) * (down * across) + tile, square)
            current = tl.zeros((OUT, IN), tl.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """The rows of some segments, cut into blocks that do not cross segments. All int32 on the device."""

    starts: Tensor  # [blocks]
    stops: Tensor  # [blocks]
    finished: Tensor  # [blocks]: the segment that ends here, else -1

    @staticmethod
    def of(lengths: Sequence[int], chosen: Sequence[int], rows: int, device: torch.device) -> Blocks:
        table, begin = [], 0
        wanted = set(chosen)
        for segment, length in enumerate(lengths):
            stop = begin + length
            if segment in wanted:
                firsts = range(begin, stop, rows)
                table += [(at, min(at + rows, stop), segment if at + rows >= stop else -1) for at in firsts]
            begin = stop
        starts, stops, finished = torch.tensor(table, dtype=torch.int32).reshape(-1, 3).T.contiguous().to(device)
        return Blocks(starts=starts, stops=stops, finished=finished)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of row blocks of some segments, on and below the diagonal. int32 but `counts`."""

    uppers: Tensor  # [pairs]
    lowers: Tensor  # [pairs]
    ends: Tensor  # [pairs]
    counts: Tensor  # [chosen] int64, pairs of each segment

    @staticmethod
    def of(lengths: Sequence[int], chosen: Sequence[int], rows: int, device: torch.device) -> Pairs:
        table, counts = [], []
        begins = [0]
        for length in lengths:
            begins.append(begins[-1] + length)
        for segment in chosen:
            begin, end = begins[segment], begins[segment + 1]
            firsts = range(begin, end, rows)
            made = [(upper, lower, end) for upper in firsts for lower in firsts if lower <= upper]
            table += made
            counts.append(len(made))
        uppers, lowers, ends = torch.tensor(table, dtype=torch.int32).reshape(-1, 3).T.contiguous().to(device)
        return Pairs(uppers=uppers, lowers=lowers, ends=ends, counts=torch.tensor(counts).to(device))


def norm_squares(activations: Tensor, gradients: Sequence[Tensor], segments: Segments) -> Tensor:
    """Sum over layers of |G_i|^2, [segments] float64: segment_gradient.weight_norm_squares.

    activations [rows, in], gradients [rows, out] of each layer.
    """
    width_in, width_out = activations.shape[1], sum(g.shape[1] for g in gradients)
    short = tuple(i for i, n in enumerate(segments.lengths) if n > 0 and gram_is_cheaper(n, width_in, width_out))
    long = tuple(i for i, n in enumerate(segments.lengths) if n and i not in set(short))
    result = torch.zeros(len(segments), dtype=torch.float64, device=activations.device)
    if short:
        pairs = segments.cached(("pairs", short), lambda: Pairs.of(segments.lengths, short, GRAM_ROWS, segments.device))
        chosen = segments.cached(("chosen", short), lambda: torch.tensor(short).to(segments.device))
        for first in range(0, len(gradients), 3):
            result[chosen] += gram_norm_squares(activations, gradients[first : first + 3], pairs)
    if long:
        for g in gradients:
            result += direct_norm_squares(activations, g, blocks_of(segments, long), len(segments))
    return result


def blocks_of(segments: Segments, chosen: tuple[int, ...]) -> Blocks:
    """Blocks of the rows of `chosen` segments for weight_kernel, cut once and shared by all layers."""
    rows = NORMS_TILE.rows
    return segments.cached(("blocks", chosen, rows), lambda: Blocks.of(segments.lengths, chosen, rows, segments.device))


def gram_is_cheaper(rows: int, width_in: int, width_out: int) -> bool:
    """Whether Gram matrices take fewer products for a segment, rows that fill up the last blocks included."""
    blocks = triton.cdiv(rows, GRAM_ROWS)
    gram = blocks * (blocks + 1) // 2 * GRAM_ROWS**2 * (width_in + width_out)
    return gram <= triton.cdiv(rows, NORMS_TILE.rows) * NORMS_TILE.rows * width_in * width_out


def gram_norm_squares(activations: Tensor, gradients: Sequence[Tensor], pairs: Pairs) -> Tensor:
    """Sum over at most three layers of |G_i|^2, [chosen] float64, of the segments of `pairs`.

    activations [rows, in], gradients [rows, out] of each layer.
    """
    assert 1 <= len(gradients) <= 3
    activations, layers = rows_contiguous(activations), [rows_contiguous(g) for g in gradients]
    layers += layers[:1] * (3 - len(layers))  # not read
    out = torch.empty(len(pairs.uppers), dtype=torch.float32, device=activations.device)
    if len(out):
        with torch.cuda.device_of(activations):  # Triton launches on the current device
            gram_kernel[(len(out),)](
                activations, *layers, pairs.uppers, pairs.lowers, pairs.ends, out, activations.shape[1],
                *(g.shape[1] for g in layers), activations.stride(0), *(g.stride(0) for g in layers),
                **gram_constants(len(gradients)), **GRAM_OPTIONS,
            )  # fmt: skip
    return torch.segment_reduce(out.double(), "sum", lengths=pairs.counts, axis=0, initial=0.0)


def direct_norm_squares(activations: Tensor, gradients: Tensor, blocks: Blocks, segments: int) -> Tensor:
    """|G_i|^2 of one layer, [segments] float64; 0 for segments that are not in `blocks`.

    activations [rows, in], gradients [rows, out], of which `segments` counts all segments.
    """
    activations, gradients = rows_contiguous(activations), rows_contiguous(gradients)
    out_width, in_width = gradients.shape[1], activations.shape[1]
    tiles = triton.cdiv(out_width, NORMS_TILE.out) * triton.cdiv(in_width, NORMS_TILE.into)
    squares = torch.zeros(segments, tiles, dtype=torch.float32, device=activations.device)
    with torch.cuda.device_of(activations):
        weight_kernel[(tiles,)](
            gradients, activations, blocks.starts, blocks.stops, blocks.finished, squares,
            len(blocks.starts), out_width, in_width, gradients.stride(0), activations.stride(0),
            **weight_constants(), num_warps=NORMS_TILE.warps, num_stages=NORMS_TILE.stages,
        )  # fmt: skip
    return squares.double().sum(1)


def gram_constants(layers: int) -> dict[str, Any]:
    return {"ROWS": GRAM_ROWS, "DEPTH": GRAM_DEPTH, "LAYERS": layers}


def weight_constants() -> dict[str, Any]:
    return {"OUT": NORMS_TILE.out, "IN": NORMS_TILE.into, "ROWS": NORMS_TILE.rows, "GROUP": GROUP}


def rows_contiguous(x: Tensor) -> Tensor:
    """x [rows, width] with neighbouring elements of a row side by side, as the kernels read them."""
    return x if x.stride(1) == 1 else x.contiguous()
