"""Per-trajectory gradients of packed layers, without ever storing one per trajectory.

Formulas: docs/algorithms.md#exact-norms. Definitions: reference.py. A segment is a trajectory's rows.

A linear layer with packed activations a [rows, in] and output gradients g [rows, out] has, for segment i, the weight
gradient G_i = sum_{t in i} g_t a_t^T [out, in]. This file has |G_i|^2 of linear layers and of the embedding, and sums
over segments for vectors (norms, biases); the head is in head_gradient.py. Weighted sums sum_i m_i G_i = (m g)^T a are
ordinary products and left to the caller.

|G_i|^2 is formed in the cheaper of two ways, for segments of similar length padded together (no loop per segment):
- Gram: sum_{s,t in i} (g_s . g_t) (a_s . a_t), about n^2 / 2 (in + out) products for n rows; short segments;
- direct: G_i tile by tile, n in out products; long segments in narrow layers.
On CUDA Triton does both (segment_gradient_triton).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from async_rl_kernels.product import promoted, uses_triton_products

Made = TypeVar("Made")

BUCKET_ROWS = 1024
"""rows of a bucket on a CPU: copies of them stay in the second-level cache"""
GRAM_BLOCK = 32
"""rows of a Gram matrix formed at a time; only blocks on and below the diagonal are"""
DIRECT_TILE = 1 << 18
"""elements of the G_i formed at a time"""
PIECE_ROWS = 64
"""rows of a segment that one thread of a GPU adds up"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bucket:
    """Segments of similar length, padded to the longest with copies of their last row.

    b segments in the bucket, `longest` rows each.
    """

    segments: Tensor  # [b] int64, which they are
    rows: Tensor  # [b * longest] int64, into the packed rows
    padding: Tensor  # [padded rows] int64, into `rows`
    longest: int
    """rows"""

    def take(self, packed: Tensor, rows: Tensor | None = None) -> Tensor:
        """The rows of its segments: [rows, ...] -> [b, longest, ...]. rows [rows] int64: where each lies in `packed`;
        None: in order."""
        chosen = self.rows if rows is None else rows[self.rows]
        return packed.index_select(0, chosen).unflatten(0, (-1, self.longest))

    def take_padded(self, packed: Tensor) -> Tensor:
        """Like `take`, but padding is 0: [rows, ...] -> [b, longest, ...]."""
        rows = packed.index_select(0, self.rows)
        if len(self.padding):
            rows.index_fill_(0, self.padding, 0)
        return rows.unflatten(0, (-1, self.longest))


class Segments:
    """Consecutive rows that belong together: `Segments([5, 0, 3])` has rows 0..4, none, 5..7."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(int(n) for n in lengths)
        self.rows = sum(self.lengths)
        sizes = torch.tensor(self.lengths, dtype=torch.int64)
        ends = sizes.cumsum(0)
        self.starts = (ends - sizes).to(device)  # [segments] int64
        self.sizes = sizes.to(device)  # [segments] int64
        self.ids = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(device)  # [rows] int64
        self.device = torch.device(device)
        self._buckets: list[Bucket] | None = None
        self._cached: dict[object, Any] = {}

    def cached(self, key: object, make: Callable[[], Made]) -> Made:
        """What `make` returned when `key` was first asked for: tables that all layers share are made once."""
        if key not in self._cached:
            self._cached[key] = make()
        return self._cached[key]

    def __len__(self) -> int:
        return len(self.lengths)

    def start(self, segment: int) -> int:
        """First row of `segment`; the number of rows for segment == len(self)."""
        return sum(self.lengths[:segment])

    @property
    def pieces(self) -> tuple[Tensor, Tensor]:
        """Every segment in pieces of at most PIECE_ROWS rows: [pieces] int64, first row of each; [segments] int64, the
        first piece of each segment."""

        def cut() -> tuple[Tensor, Tensor]:
            counts = torch.tensor([-(-n // PIECE_ROWS) for n in self.lengths], dtype=torch.int64)
            first = counts.cumsum(0) - counts
            starts = torch.repeat_interleave(self.starts.cpu() - PIECE_ROWS * first, counts)
            return (starts + PIECE_ROWS * torch.arange(len(starts))).to(self.device), first.to(self.device)

        return self.cached(("pieces", PIECE_ROWS), cut)

    @property
    def buckets(self) -> list[Bucket]:
        """Every segment with rows, in one bucket each."""
        if self._buckets is None:
            limit = BUCKET_ROWS if self.device.type == "cpu" else 64 * BUCKET_ROWS
            self._buckets = [self._bucket(members) for members in _similar(self.lengths, limit)]
        return self._buckets

    def _bucket(self, members: Sequence[int]) -> Bucket:
        longest = self.lengths[members[0]]
        which = torch.tensor(members, dtype=torch.int64).to(self.device)
        size, start = self.sizes[which, None], self.starts[which, None]
        column = torch.arange(longest, device=self.device)[None, :]
        rows = start + torch.minimum(column, size - 1)
        padding = (column >= size).flatten().nonzero().squeeze(-1)
        return Bucket(segments=which, rows=rows.flatten(), padding=padding, longest=longest)


def _similar(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Segments by falling length, cut where padding would exceed an eighth, or the rows of a bucket `limit`."""
    out: list[list[int]] = []
    for segment in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        longest = lengths[out[-1][0]] if out else 0
        fits = out and longest - lengths[segment] <= longest // 8 and longest * (len(out[-1]) + 1) <= limit
        if fits:
            out[-1].append(segment)
        else:
            out.append([segment])
    return out


def weight_norm_squares(
    activations: Tensor, gradients: Sequence[Tensor], segments: Segments, rows: Tensor | None = None
) -> Tensor:
    """Sum over layers of |G_i|^2, [segments] float64, for layers that share their input.

    activations [rows, in], gradients [rows, out] of each layer; any float dtype, products in float32 or better. rows
    [rows] int64: the activation that belongs to each row of the gradients, where several have the same; None: they are
    in order. Definition: reference.segmented_weight_grad.
    """
    assert all(g.shape[0] == segments.rows for g in gradients)
    assert len(activations if rows is None else rows) == segments.rows
    if uses_triton_products(activations):
        from async_rl_kernels.segment_gradient_triton import norm_squares

        every = activations if rows is None else activations.index_select(0, rows)
        return norm_squares(every, gradients, segments)
    result = torch.zeros(len(segments), dtype=torch.float64, device=activations.device)
    width = sum(g.shape[1] for g in gradients)
    for bucket in segments.buckets:
        a = promoted(bucket.take(activations, rows))
        padded = [promoted(bucket.take_padded(g)) for g in gradients]
        longest = bucket.longest
        gram_cost = (longest + min(longest, GRAM_BLOCK)) / 2 * (a.shape[-1] + width)
        if gram_cost <= a.shape[-1] * width:
            values = _gram(a, padded)
        else:
            values = _direct(a, padded)
        result[bucket.segments] = values
    return result


def _gram(a: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """|G_i|^2 from Gram matrices: a [b, n, in], each gradient [b, n, out] -> [b] float64.

    The product of the two Gram matrices is symmetric: what is below the diagonal blocks counts twice.
    """
    total = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], GRAM_BLOCK):
        stop = start + GRAM_BLOCK
        product = _sum_of_grams(gradients, start, stop)
        product.mul_(torch.bmm(a[:, start:stop], a[:, :stop].mT))
        total += 2 * product.sum((1, 2))
        total -= product[:, :, start:].sum((1, 2))
    return total


def _sum_of_grams(gradients: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows start <= s < stop of the sum of the layers' Gram matrices: [b, stop - start, stop]."""
    out = torch.bmm(gradients[0][:, start:stop], gradients[0][:, :stop].mT)
    for g in gradients[1:]:
        out.baddbmm_(g[:, start:stop], g[:, :stop].mT)
    return out


def _direct(a: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """|G_i|^2 by forming G_i tile by tile: a [b, n, in], each gradient [b, n, out] -> [b] float64."""
    total = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    tile = max(1, DIRECT_TILE // a.shape[-1])
    for g in gradients:
        for i in range(a.shape[0]):
            for start in range(0, g.shape[-1], tile):
                piece = (g[i, :, start : start + tile].T @ a[i]).flatten()
                total[i] += torch.dot(piece, piece)
    return total


def segment_sums(values: Tensor, segments: Segments, scale: Tensor | None = None) -> Tensor:
    """Sum of each segment's rows, each times its `scale`: [segments, width], float32 or better, in a fixed order.

    values [rows * k, width] and scale [rows * k], with k rows for each packed row (heads).
    """
    repeats = values.shape[0] // max(1, segments.rows)
    assert values.shape[0] == repeats * segments.rows
    values = promoted(values)
    if repeats > 1:
        values = values if scale is None else values * scale.to(values.dtype)[:, None]
        values, scale = values.unflatten(0, (-1, repeats)).sum(1), None
    # In two steps: on CUDA one thread adds up a bag, which for a long answer would be thousands of rows. Not a product
    # with one-hot rows: in that a NaN of one segment, times zero, reaches the sums of all.
    starts, first = segments.pieces
    sums = _bags(values, torch.arange(len(values), device=values.device), starts, scale)
    return _bags(sums, torch.arange(len(sums), device=values.device), first)


def embedding_norm_squares(gradients: Tensor, tokens: Tensor, segments: Segments) -> Tensor:
    """|G_i|^2 of an embedding from the gradients of its outputs, [segments] float64.

    It is the sum over the ids of a segment of the square of the sum of their rows.
    gradients [rows, width], tokens [rows] int64.
    """
    result = torch.zeros(len(segments), dtype=torch.float64, device=gradients.device)
    if segments.rows == 0:
        return result
    order = torch.argsort(tokens, stable=True)
    order = order[torch.argsort(segments.ids[order], stable=True)]
    owner, token = segments.ids[order], tokens[order]
    # a bag is as long as an id is frequent in a segment: some hundred rows in the longest answers
    new = torch.ones_like(owner, dtype=torch.bool)
    new[1:] = (owner[1:] != owner[:-1]) | (token[1:] != token[:-1])
    first = new.nonzero().squeeze(-1)
    sums = _bags(promoted(gradients), order, first)
    return result.index_add_(0, owner[first], torch.linalg.vecdot(sums, sums).double())


def _bags(values: Tensor, rows: Tensor, first: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sums of scale[first[i]:first[i + 1]] * values[rows[first[i]:first[i + 1]]]: [bags, width].

    values [any, width], rows [n] int64, first [bags] int64, scale [n]. Not index_add_: its order is not fixed on CUDA.
    """
    scale = None if scale is None else scale.to(values.dtype)
    return F.embedding_bag(rows, values, first, mode="sum", per_sample_weights=scale)
