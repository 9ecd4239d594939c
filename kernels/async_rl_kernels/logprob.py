"""Log-probs of given tokens from hidden states and the head, without a [tokens, vocabulary] matrix.

Formulas: docs/algorithms.md#linear-logprob. Definition: reference.linear_logprob.

Shapes: T tokens, H hidden, V vocabulary ids (of this rank's part of the head). Logits x = hidden . weight / temperature
are [T, V], and only a tile of them, [rows, ids], exists at a time, in the forward and again in the backward (computed
again, one more product, unless they are few: `keeps`). `head_sums` and `head_gradients` walk the tiles, `TileKernels`
are what is done to one: in torch operations here, on CUDA in one pass over the tile (logprob_triton). Sums are float32,
float64 for float64 input.

The products are left to cuBLAS or oneDNN: they are 4096 deep, which is what those are best at. A fused kernel would
save the tile's way to memory and back, 14 to 22 bytes a logit, about 1/8 of the time of the products of a 4096-wide
head on an H200 (bench/kernels_gpu.py has the arithmetic), and pay for it with slower products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from async_rl_kernels.product import product, put_product, uses_triton

CPU_TILE = 1 << 22, 1024
"""logits of a tile, and rows from which on a tile is cut along the vocabulary too; 16 MiB of float32"""
CUDA_TILE = 1 << 25, 8192
"""the same on CUDA; 128 MiB of float32"""
CPU_KEPT = 1 << 25
"""logits that are kept on a CPU for the backward pass, 128 MiB of float32; where there are more, none are"""
PIECE_ELEMENTS = 1 << 17
"""logits that go through all operations before the next ones: they stay in the second-level cache"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbs:
    """Columns of float32 (float64 for float64 input), one row a token, all differentiable."""

    log_prob: Tensor  # [T]
    entropy: Tensor  # [T], nats
    prob_square_sum: Tensor  # [T], sum over the vocabulary of pi^2
    log_proxy: Tensor | None = None  # [T], of min_p.min_p_log_prob, not differentiable; None: not asked for


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    cap: Tensor | None = None,
    products: torch.dtype | None = None,
    shard: Shard | None = None,
    tiles: Tiles | None = None,
    kernels: TileKernels | None = None,
) -> LogProbs:
    """Log pi of `targets` under softmax(hidden @ weight.T / temperature), entropy and sum of pi^2.

    Args:
        hidden: [T, H], of the same float dtype as `weight`.
        weight: [V, H].
        targets: [T] int64.
        cap: [T]; before the temperature a token's logits x become cap * tanh(x / cap), as in Gemma 2. None: they stay.
        products: dtype that both are rounded to, tile by tile, before they are multiplied; sums stay float32.
        shard: says that `weight` is this rank's part of the vocabulary.
        tiles, kernels: how the work is cut and what does it; the device decides by default.

    Raises ValueError for a temperature that is not positive, IndexError for a target outside the vocabulary (not
    checked on CUDA, where it would wait for the device).
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if shard is None and len(targets) and targets.device.type == "cpu":
        least, most = targets.aminmax()
        if least < 0 or most >= len(weight):
            raise IndexError(f"a target is {int(least if least < 0 else most)}, the vocabulary has {len(weight)} ids")
    tiles = tiles or tiles_for(hidden, weight)
    kernels = kernels or tile_kernels(hidden)
    columns = _LinearLogProb.apply(hidden, weight, targets, 1.0 / temperature, cap, products, shard, tiles, kernels)
    log_prob, entropy, square = columns
    return LogProbs(log_prob=log_prob, entropy=entropy, prob_square_sum=square)


class _LinearLogProb(torch.autograd.Function):
    """hidden [T, H], weight [V, H], targets [T] int64 -> log-prob, entropy, sum of pi^2, [T] each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        cap: Tensor | None,
        products: torch.dtype | None,
        shard: Shard | None,
        tiles: Tiles,
        kernels: TileKernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        local = targets if shard is None else targets - shard.start
        keep = any(ctx.needs_input_grad)
        kept: list[Tensor] | None = [] if keep and keeps(tiles, hidden) else None
        sums = head_sums(hidden, weight, local, scale, tiles, kernels, cap=cap, products=products, kept=kept)
        if shard is not None:
            sums = shard.combined(sums)
        entropy, square = sums.entropy, sums.prob_square_sum
        ctx.chosen = scale, cap, products, shard, tiles, kernels
        ctx.save_for_backward(hidden, weight, local, sums.log_normaliser, entropy, square, *(kept or ()))
        ctx.set_materialize_grads(False)
        return sums.log_prob, entropy, square

    @staticmethod
    def backward(
        ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, grad_square: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, local, log_normaliser, entropy, square, *kept = ctx.saved_tensors
        scale, cap, products, shard, tiles, kernels = ctx.chosen
        if grad_log_prob is None and grad_entropy is None and grad_square is None:
            return (None,) * 9
        pull = Pull(
            log_normaliser=log_normaliser,
            log_prob=torch.zeros_like(entropy) if grad_log_prob is None else grad_log_prob,
            entropy=None if grad_entropy is None else (grad_entropy, entropy),
            square=None if grad_square is None else (grad_square, square),
        )
        of_hidden, of_weight, *_ = ctx.needs_input_grad
        grad_hidden, grad_weight = head_gradients(
            hidden, weight, local, scale, pull, tiles, kernels,
            need_hidden=of_hidden, need_weight=of_weight, cap=cap, products=products,
            kept=kept,
        )  # fmt: skip
        if shard is not None and grad_hidden is not None:
            grad_hidden = shard.summed(grad_hidden)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A head that is cut along the vocabulary over the ranks of a group (tensor parallel).

    Every rank passes the same hidden states and targets and its own rows of the weight. Every rank gets the columns of
    the whole vocabulary, the whole gradient of the hidden states, and the gradient of its own rows.
    """

    start: int
    """id of this rank's first row"""
    group: dist.ProcessGroup

    def combined(self, sums: VocabularySums) -> VocabularySums:
        """The sums over the whole vocabulary, [T] each. Collective."""
        mine = sums.columns.contiguous()
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, mine, group=self.group)
        return VocabularySums(columns=torch.stack(every, 1)).combined()

    def summed(self, gradient: Tensor) -> Tensor:
        """The sum over ranks, in float32 or better; any shape. Collective."""
        total = gradient if gradient.dtype == torch.float64 else gradient.float()
        total = total.contiguous()
        dist.all_reduce(total, group=self.group)
        return total.to(gradient.dtype)


# Tiles: how [T, V] is cut, and the loops over it.


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How the logits [tokens, vocabulary] are cut: tiles of `rows` x `ids`."""

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
    """Logits held at a time, and rows from which on a tile is cut along the vocabulary too."""
    return CUDA_TILE if device.type == "cuda" else CPU_TILE


def tiles_for(hidden: Tensor, weight: Tensor) -> Tiles:
    """The tiles that the device of hidden [T, H] works best with. weight [V, H]."""
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
    cap: Tensor | None = None,
    products: torch.dtype | None = None,
    kept: list[Tensor] | None = None,
) -> VocabularySums:
    """Sums over the ids of `weight` [T]. kept: gets the (capped) logits, tile by tile.

    hidden [T, H], weight [V, H], local [T] int64: each target's row of `weight`, which may lie outside. cap [T].
    scale: 1 / temperature. products: dtype that both are rounded to before they are multiplied; None: as they are.
    """
    hidden = hidden.to(products or hidden.dtype)
    parts = VocabularySums.empty((len(tiles.id_parts), len(hidden)), product_dtype(hidden), hidden.device)
    for number, ids in enumerate(tiles.id_parts):
        head = weight[ids].to(hidden.dtype)
        for rows in tiles.row_parts:
            logits = capped(product(hidden[rows], head), cap, rows)
            kernels.sums(logits, local[rows] - ids.start, scale, parts.part(number).rows(rows))
            if kept is not None:
                kept.append(logits)
            del logits  # before the next one is made
    return parts.combined()


def keeps(tiles: Tiles, hidden: Tensor) -> bool:
    """Whether the logits stay in memory until the backward pass: those of a single tile, on a CPU up to CPU_KEPT."""
    few = hidden.device.type == "cpu" and tiles.tokens * tiles.vocabulary <= CPU_KEPT
    return few or tiles.single


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
    cap: Tensor | None = None,
    products: torch.dtype | None = None,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor | None, Tensor | None]:
    """d(loss)/d(hidden) [T, H] and d(loss)/d(weight) [V, H], in the inputs' dtype; None for what is not needed.

    The loop over ids is outside and that over rows inside: the gradient of the weight is complete after its ids, and
    only that of the hidden states is summed over tiles (float32 for bfloat16 inputs). The other way round the running
    sum would have the head's size, 2.5 GB for 151,936 x 4096.

    kept: the logits of every tile, as `head_sums` gave them; empty: they are computed again.
    """
    exact = product_dtype(hidden)
    total_hidden = torch.zeros_like(hidden, dtype=exact) if need_hidden else None
    grad_weight = None
    if need_weight:  # every row is written by the first product, if there is one
        grad_weight = torch.empty_like(weight) if len(hidden) else torch.zeros_like(weight)
    states = hidden.to(products or hidden.dtype)
    # On CUDA tensor cores multiply tiles of the inputs' dtype; on a CPU a tile stays as it is.
    dtype = states.dtype if hidden.device.type == "cuda" else exact
    there = iter(kept)
    for number, ids in enumerate(tiles.id_parts):
        head = weight[ids].to(states.dtype)
        total_weight = None
        if grad_weight is not None:
            total_weight = grad_weight[ids] if weight.dtype == exact else torch.zeros_like(head, dtype=exact)
        for first, rows in enumerate(tiles.row_parts):
            logits = next(there) if kept else capped(product(states[rows], head), cap, rows)
            # d(cap tanh(x / cap)) / dx
            slope = None if cap is None else (logits / cap[rows, None]).square_().neg_().add_(1)
            tile = kernels.gradient(logits, local[rows] - ids.start, scale, pull.rows(rows), dtype, keep=bool(kept))
            if slope is not None:
                tile.mul_(slope.to(tile.dtype))
            del logits, slope
            if total_hidden is not None:
                put_product(total_hidden[rows], tile, head, add=number > 0)
            if total_weight is not None:
                put_product(total_weight, tile.T, states[rows], add=first > 0)
            del tile
        if grad_weight is not None and total_weight is not None and weight.dtype != exact:
            grad_weight[ids] = total_weight
        del total_weight
    return None if total_hidden is None else total_hidden.to(hidden.dtype), grad_weight


def capped(logits: Tensor, cap: Tensor | None, rows: slice) -> Tensor:
    """cap * tanh(logits / cap) of the logits [rows, ids] of some rows, in place; cap [T]; None: as they are."""
    return logits if cap is None else logits.div_(cap[rows, None]).tanh_().mul_(cap[rows, None])


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of sums over `hidden` [T, H]: float32, float64 for float64."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


# One tile: the sums over its ids, and the gradient of its logits.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabularySums:
    """What a softmax is made of: sums of scaled logits x_j = h . w_j / temperature over some ids j.

    A part is a tile of one matrix, or what another rank holds: `combined` puts both together. float32 or float64.
    """

    columns: Tensor  # [5, T], or [5, parts, T] before `combined`

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> VocabularySums:
        """Memory to be written; `shape` is (T,) or (parts, T)."""
        return VocabularySums(columns=torch.empty((5, *shape), dtype=dtype, device=device))

    @property
    def largest(self) -> Tensor:  # [T]
        """m = max x_j, [T] like all that follow"""
        return self.columns[0]

    @property
    def total(self) -> Tensor:  # [T]
        """sum exp(x_j - m)"""
        return self.columns[1]

    @property
    def spread(self) -> Tensor:  # [T]
        """sum exp(x_j - m) (x_j - m)"""
        return self.columns[2]

    @property
    def square(self) -> Tensor:  # [T]
        """sum exp(x_j - m)^2"""
        return self.columns[3]

    @property
    def chosen(self) -> Tensor:  # [T]
        """x of the target id, 0 where it is not among the ids"""
        return self.columns[4]

    def part(self, number: int) -> VocabularySums:
        """[parts, T] -> [T], the same memory."""
        return VocabularySums(columns=self.columns[:, number])

    def rows(self, part: slice) -> VocabularySums:
        """[T] -> fewer rows, the same memory."""
        return VocabularySums(columns=self.columns[:, part])

    def combined(self) -> VocabularySums:
        """[parts, T] -> [T]: the sums over the ids of all parts."""
        if self.columns.shape[1] == 1:
            return self.part(0)
        largest = self.largest.amax(0)
        lower = self.largest - largest
        factor = lower.exp()
        columns = [
            largest,
            (factor * self.total).sum(0),
            (factor * (self.spread + lower * self.total)).sum(0),
            (factor.square() * self.square).sum(0),
            self.chosen.sum(0),
        ]
        return VocabularySums(columns=torch.stack(columns))

    @property
    def log_normaliser(self) -> Tensor:  # [T]
        """log sum exp x_j"""
        return self.largest + self.total.log()

    @property
    def log_prob(self) -> Tensor:  # [T]
        return self.chosen - self.log_normaliser

    @property
    def entropy(self) -> Tensor:  # [T]
        return self.total.log() - self.spread / self.total

    @property
    def prob_square_sum(self) -> Tensor:  # [T]
        return self.square / self.total.square()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pull:
    """The gradients that arrive at a token's columns, and the columns where the derivative needs them.

    All [T], float32 or better.
    """

    log_normaliser: Tensor
    log_prob: Tensor
    """d(loss)/d(log-prob)"""
    entropy: tuple[Tensor, Tensor] | None = None
    """d(loss)/d(entropy), entropy"""
    square: tuple[Tensor, Tensor] | None = None
    """d(loss)/d(sum of pi^2), sum of pi^2"""

    def rows(self, part: slice) -> Pull:
        def cut(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if pair is None else (pair[0][part], pair[1][part])

        return Pull(
            log_normaliser=self.log_normaliser[part],
            log_prob=self.log_prob[part],
            entropy=cut(self.entropy),
            square=cut(self.square),
        )


class TileKernels(Protocol):
    """What is done to a tile between two matrix products.

    logits [rows, ids] = hidden . weight, float32 or better, contiguous. local [rows] int64: the target's column, which
    may lie outside the tile. scale: 1 / temperature.
    """

    def sums(self, logits: Tensor, local: Tensor, scale: float, out: VocabularySums) -> None:
        """Write the sums over the ids to `out` [rows]. The logits stay as they are."""

    def gradient(
        self, logits: Tensor, local: Tensor, scale: float, pull: Pull, dtype: torch.dtype, *, keep: bool = False
    ) -> Tensor:
        """d(loss)/d(logits) [rows, ids] in `dtype`. keep: the logits stay as they are; else they may be overwritten."""


class TorchTile:
    """TileKernels in torch operations, on every device but CUDA."""

    def sums(self, logits: Tensor, local: Tensor, scale: float, out: VocabularySums) -> None:  # [rows, ids], [rows]
        width = logits.shape[1]
        inside = (local >= 0) & (local < width)
        chosen = logits.gather(1, local.clamp(0, width - 1)[:, None]).squeeze(1)
        out.chosen.copy_(torch.where(inside, chosen * scale, 0.0))
        for rows in pieces(logits):
            x = logits[rows] if scale == 1.0 else logits[rows] * scale
            torch.amax(x, 1, out=out.largest[rows])
            x = x - out.largest[rows, None]
            weight = x.exp()
            torch.sum(weight, 1, out=out.total[rows])
            out.spread[rows] = torch.linalg.vecdot(weight, x)
            out.square[rows] = torch.linalg.vecdot(weight, weight)

    def gradient(
        self, logits: Tensor, local: Tensor, scale: float, pull: Pull, dtype: torch.dtype, *, keep: bool = False
    ) -> Tensor:
        """pi_j (-g - e (log pi_j + H) + 2 q (pi_j - S)) and g more at the target, times the scale."""
        found = torch.empty_like(logits) if keep else logits
        for rows in pieces(logits):
            x, of = found[rows], pull.rows(rows)
            if scale != 1.0:
                torch.mul(logits[rows], scale, out=x)
                x.sub_(of.log_normaliser[:, None])
            else:
                torch.sub(logits[rows], of.log_normaliser[:, None], out=x)
            if of.entropy is None and of.square is None:
                x.exp_().mul_((-scale * of.log_prob)[:, None])
                continue
            probs, factor = x.exp(), (-of.log_prob)[:, None]
            if of.entropy is not None:
                factor = factor - of.entropy[0][:, None] * (x + of.entropy[1][:, None])
            if of.square is not None:
                factor = factor + 2 * of.square[0][:, None] * (probs - of.square[1][:, None])
            torch.mul(probs, factor, out=x)
            x.mul_(scale)
        width = logits.shape[1]
        inside = (local >= 0) & (local < width)
        at_target = torch.where(inside, scale * pull.log_prob, 0.0).to(found.dtype)
        found.scatter_add_(1, local.clamp(0, width - 1)[:, None], at_target[:, None])
        return found.to(dtype)


def pieces(tile: Tensor) -> list[slice]:
    """Slices of rows with about PIECE_ELEMENTS logits each, of a tile [rows, ids]."""
    step = max(1, PIECE_ELEMENTS // tile.shape[1])
    return [slice(start, start + step) for start in range(0, len(tile), step)]


def tile_kernels(hidden: Tensor) -> TileKernels:
    """What works on tiles of hidden [T, H]: Triton on CUDA, torch operations elsewhere."""
    if uses_triton(hidden):
        from async_rl_kernels.logprob_triton import TritonTile

        return TritonTile()
    return TorchTile()
