"""The head's products tile by tile: sums over the vocabulary, and gradients from them.

logits = hidden . weight is [tokens, vocabulary]; only a tile of it, rows x ids, exists at a time. In between
two products a tile is touched once (logit_tile). The products are left to cuBLAS or oneDNN: they are 4096
deep, which is what those are best at; a fused kernel would save the tile's way to memory and back, 14 to 22
bytes a logit, about 1/8 of the time of the products of a 4096-wide head on an H200 (bench/kernels.py has the
arithmetic), and pay for it with slower products.

The gradients walk the ids outside and the rows inside: a weight gradient is then complete after its ids and
only the hidden states' gradient is summed over tiles, in float32 (tokens x hidden x 4 bytes for bfloat16
inputs). The other way round the sum would have the head's size, 2.5 GB for 151,936 x 4096.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from async_rl_kernels.logit_tile import Pull, TileKernels, VocabularySums
from async_rl_kernels.product import product, put_product

CPU_TILE = 1 << 22, 1024
"""float32 16 MiB"""
CUDA_TILE = 1 << 25, 8192
"""float32 128 MiB"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How [tokens, vocabulary] is cut."""

    tokens: int
    vocabulary: int
    rows: int
    ids: int

    @staticmethod
    def fitting(tokens: int, vocabulary: int, *, elements: int, least_rows: int) -> Tiles:
        """Tiles of at most `elements` (at least one logit): whole rows while `least_rows` of them fit."""
        rows = max(1, min(tokens, max(min(least_rows, elements), elements // vocabulary)))
        return Tiles(tokens=tokens, vocabulary=vocabulary, rows=rows, ids=min(vocabulary, max(1, elements // rows)))

    @property
    def row_parts(self) -> list[slice]:
        return [slice(at, min(self.tokens, at + self.rows)) for at in range(0, self.tokens, self.rows)]

    @property
    def id_parts(self) -> list[slice]:
        return [slice(at, min(self.vocabulary, at + self.ids)) for at in range(0, self.vocabulary, self.ids)]

    @property
    def single(self) -> bool:
        return self.rows >= self.tokens and self.ids == self.vocabulary


def tile_limits(device: torch.device) -> tuple[int, int]:
    """logits held at a time, and rows from which on a tile is cut along the vocabulary too"""
    return CUDA_TILE if device.type == "cuda" else CPU_TILE


def tiles_for(hidden: Tensor, weight: Tensor) -> Tiles:
    elements, least_rows = tile_limits(hidden.device)
    return Tiles.fitting(len(hidden), len(weight), elements=elements, least_rows=least_rows)


def head_sums(
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    scale: float,
    tiles: Tiles,
    kernels: TileKernels,
    *,
    products: torch.dtype | None = None,
    keep_single: bool = False,
) -> tuple[VocabularySums, Tensor | None]:  # [tokens]
    """Sums over the ids of `weight`, and the logits if they are a single tile and wanted.

    hidden [tokens, width], weight [ids, width], local [tokens] int64: row of weight, which may be outside.
    scale: 1 / temperature. products: dtype that both are rounded to before they are multiplied; None: as they are.
    """
    hidden = hidden.to(products or hidden.dtype)
    parts = VocabularySums.empty((len(tiles.id_parts), len(hidden)), product_dtype(hidden), hidden.device)
    kept: Tensor | None = None
    for number, ids in enumerate(tiles.id_parts):
        head = weight[ids].to(hidden.dtype)
        for rows in tiles.row_parts:
            logits = product(hidden[rows], head)
            kept = logits.clone() if keep_single and tiles.single else None
            kernels.sums(logits, local[rows] - ids.start, scale, parts.part(number).rows(rows))
            del logits  # before the next one is made
    return parts.combined(), kept


def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    scale: float,
    pull: Pull,
    tiles: Tiles,
    kernels: TileKernels,
    *,
    need_hidden: bool,
    need_weight: bool,
    products: torch.dtype | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """d(loss)/d(hidden), d(loss)/d(weight), in the inputs' dtype.

    kept: the logits of a single tile, which are overwritten.
    """
    exact = product_dtype(hidden)
    total_hidden = torch.zeros_like(hidden, dtype=exact) if need_hidden else None
    grad_weight = torch.zeros_like(weight) if need_weight else None
    states = hidden.to(products or hidden.dtype)
    # On CUDA tensor cores multiply tiles of the inputs' dtype; on a CPU a tile stays as it is.
    dtype = states.dtype if hidden.device.type == "cuda" else exact
    for number, ids in enumerate(tiles.id_parts):
        head = weight[ids].to(states.dtype)
        total_weight = None
        if grad_weight is not None:
            total_weight = grad_weight[ids] if weight.dtype == exact else torch.zeros_like(head, dtype=exact)
        for first, rows in enumerate(tiles.row_parts):
            logits = product(states[rows], head) if kept is None else kept
            tile = kernels.gradient(logits, local[rows] - ids.start, scale, pull.rows(rows), dtype)
            del logits
            if total_hidden is not None:
                put_product(total_hidden[rows], tile, head, add=number > 0)
            if total_weight is not None:
                put_product(total_weight, tile.T, states[rows], add=first > 0)
            del tile
        if grad_weight is not None and total_weight is not None and weight.dtype != exact:
            grad_weight[ids] = total_weight
        del total_weight
    return None if total_hidden is None else total_hidden.to(hidden.dtype), grad_weight


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What sums are held in: float32, float64 for float64."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
