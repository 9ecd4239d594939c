"""logprob.TileKernels on CUDA: the sums of a tile of logits in one read, its gradient in one read and one write.

A program takes whole rows of the tile, so nothing is shared between programs and sums have one order. Triton is
imported here and nowhere else that a CPU needs; `TritonTile` launches, the two functions above it are kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from async_rl_kernels.logprob import Pull, VocabularySums

BLOCK = 4096
"""logits of a row held at a time: 16 in each thread of 8 warps"""
WARPS = 8


@triton.jit
def sums_kernel(
    logits,
    local,
    out,
    width,
    logits_stride,
    out_stride,
    scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row `program` of logits [rows, width] -> largest, total, spread, square, chosen in out [5, rows]."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * logits_stride
    column = tl.arange(0, BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    spread = tl.zeros((), tl.float32)
    square = tl.zeros((), tl.float32)
    for first in range(0, width, BLOCK):
        inside = first + column < width
        x = tl.load(start + first + column, mask=inside, other=float("-inf")).to(tl.float32) * scale
        highest = tl.maximum(largest, tl.max(x, 0))
        lower = tl.where(first > 0, largest - highest, 0.0)  # not -inf times 0
        factor = tl.exp(lower)
        x = x - highest
        weight = tl.exp(x)
        spread = factor * (spread + lower * total) + tl.sum(weight * tl.where(inside, x, 0.0), 0)
        total = factor * total + tl.sum(weight, 0)
        square = factor * factor * square + tl.sum(weight * weight, 0)
        largest = highest
    target = tl.load(local + row)
    here = (target >= 0) & (target < width)
    chosen = tl.load(start + target, mask=here, other=0.0).to(tl.float32) * scale
    tl.store(out + row, largest)
    tl.store(out + out_stride + row, total)
    tl.store(out + 2 * out_stride + row, spread)
    tl.store(out + 3 * out_stride + row, square)
    tl.store(out + 4 * out_stride + row, chosen)


@triton.jit
def gradient_kernel(
    logits,
    local,
    out,
    log_normaliser,
    of_log_prob,
    of_entropy,
    entropy,
    of_square,
    square,
    width,
    logits_stride,
    out_stride,
    scale,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
):  # fmt: skip
    """out[row, j] = scale (pi_j (-g - e (log pi_j + H) + 2 q (pi_j - S)) + g [j is the target]), a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(logits + row * logits_stride + column, mask=inside, other=float("-inf")).to(tl.float32) * scale
    log_pi = x - tl.load(log_normaliser + row)
    pi = tl.exp(log_pi)
    pull = tl.load(of_log_prob + row)
    factor = tl.zeros((BLOCK,), tl.float32) - pull
    if ENTROPY:
        factor -= tl.load(of_entropy + row) * (log_pi + tl.load(entropy + row))
    if SQUARE:
        factor += 2 * tl.load(of_square + row) * (pi - tl.load(square + row))
    at_target = tl.where(column == tl.load(local + row), pull, 0.0)
    # A probability of 0 pulls nothing, also where log_pi is -inf (0 * inf would be NaN).
    value = scale * (tl.where(pi > 0, pi * factor, 0.0) + at_target)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


class TritonTile:
    """TileKernels in Triton: launches the two kernels above."""

    def sums(self, logits: Tensor, local: Tensor, scale: float, out: VocabularySums) -> None:  # [rows, ids], [rows]
        rows, width = logits.shape
        assert logits.stride(1) == 1
        assert out.columns.stride(1) == 1
        assert out.columns.dtype == torch.float32
        if rows:
            with torch.cuda.device_of(logits):  # Triton launches on the current device
                sums_kernel[(rows,)](
                    logits, local.contiguous(), out.columns, width, logits.stride(0), out.columns.stride(0), scale,
                    BLOCK=block_of(width), num_warps=WARPS,
                )  # fmt: skip

    def gradient(
        self, logits: Tensor, local: Tensor, scale: float, pull: Pull, dtype: torch.dtype, *, keep: bool = False
    ) -> Tensor:
        """[rows, ids], [rows] -> [rows, ids] in `dtype`."""
        rows, width = logits.shape
        assert logits.stride(1) == 1
        out = logits if dtype == logits.dtype and not keep else torch.empty_like(logits, dtype=dtype)
        block = block_of(width)
        none = (pull.log_prob, pull.log_prob)  # not read
        of_entropy, entropy = pull.entropy or none
        of_square, square = pull.square or none
        if rows:
            columns = (pull.log_normaliser, pull.log_prob, of_entropy, entropy, of_square, square)
            with torch.cuda.device_of(logits):
                gradient_kernel[(rows, triton.cdiv(width, block))](
                    logits, local.contiguous(), out, *(x.contiguous().float() for x in columns),
                    width, logits.stride(0), out.stride(0), scale,
                    BLOCK=block, ENTROPY=pull.entropy is not None, SQUARE=pull.square is not None, num_warps=WARPS,
                )  # fmt: skip
        return out


def block_of(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))
