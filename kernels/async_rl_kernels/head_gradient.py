"""The head, log pi = log_softmax(hidden @ weight.T / temperature)[target], and each segment's gradient of it.

Formulas: docs/algorithms.md#exact-norms. T policy tokens (rows), H hidden, V vocabulary, S segments.

Output gradients of the head are [T, V], too many to keep in general. They are formed in tiles of whole segments x
vocabulary ids: once for the gradient of the hidden states and the norms, and again for the weight gradient, when the
multipliers of the segments are known.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from async_rl_kernels.logprob import (
    CPU_KEPT,
    LogProbs,
    Pull,
    head_sums,
    product_dtype,
    tile_kernels,
    tile_limits,
    tiles_for,
)
from async_rl_kernels.product import batched_product, product, put_product
from async_rl_kernels.segment_gradient import Segments, weight_norm_squares


class HeadGradient:
    """Forward at construction, then `backward`, then `accumulate` as often as wanted.

    hidden [T, H], weight [V, H] of one dtype, detached, rounded to `products` before they are multiplied;
    targets [T] int64; segments of the T rows. `log_probs` are linear_logprob's, without a graph.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        segments: Segments,
        *,
        temperature: float,
        products: torch.dtype | None = None,
        tile_elements: int | None = None,
        tile_rows: int | None = None,
    ) -> None:
        """tile_elements: logit gradients held at a time; if all fit, they are kept instead of formed again.
        tile_rows: from so many on a tile is cut along the vocabulary rather than between segments. None: as the
        device needs it."""
        assert segments.rows == len(hidden) == len(targets)
        self.segments = segments
        elements, rows = tile_limits(hidden.device)
        self._tile_elements, self._tile_rows = tile_elements or elements, tile_rows or rows
        self._dtype = hidden.dtype
        hidden = hidden.to(products or hidden.dtype)
        self._hidden, self._weight, self._targets = hidden, weight, targets
        self._scale = 1.0 / temperature
        self._kernels = tile_kernels(hidden)
        with torch.no_grad():
            sums = head_sums(hidden, weight, targets, self._scale, tiles_for(hidden, weight), self._kernels)
        self.log_probs = LogProbs(log_prob=sums.log_prob, entropy=sums.entropy, prob_square_sum=sums.prob_square_sum)
        self._log_normaliser = sums.log_normaliser
        self._coefficients: Tensor | None = None
        self._kept: Tensor | None = None  # [T, V]
        few = max(self._tile_elements, CPU_KEPT if hidden.device.type == "cpu" and tile_elements is None else 0)
        self._keeps = len(hidden) * len(weight) <= few

    def backward(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """d(loss)/d(hidden) [T, H], and |G_i|^2 of the weight, [S] float64, of loss = -sum_t coefficients_t log pi_t.

        coefficients [T].
        """
        self._coefficients, self._kept = coefficients, None
        gradient = torch.zeros_like(self._hidden, dtype=product_dtype(self._hidden))
        norm_squares = torch.zeros(len(self.segments), dtype=torch.float64, device=gradient.device)
        for part in self._blocks(0):
            rows = slice(self.segments.start(part.start), self.segments.start(part.stop))
            block = Segments(self.segments.lengths[part], gradient.device)
            for ids in self._tiles(rows):
                tile = self._logit_gradients(rows, ids)
                put_product(gradient[rows], tile, self._weight[ids].to(tile.dtype), add=True)
                norm_squares[part] += weight_norm_squares(self._hidden[rows], [tile], block)
                if tile.numel() == self.segments.rows * len(self._weight):
                    self._kept = tile
                elif self._keeps:
                    if self._kept is None:
                        self._kept = tile.new_empty(self.segments.rows, len(self._weight))
                    self._kept[rows, ids] = tile
        return gradient.to(self._dtype), norm_squares

    def accumulate(self, total: Tensor, multipliers: Tensor, *, first: int = 0) -> None:
        """total [V, H] += d(-sum_t multipliers_t coefficients_t log pi_t)/d(weight), over segments from `first` on.

        multipliers [T].
        """
        for part in self._blocks(first):
            rows = slice(self.segments.start(part.start), self.segments.start(part.stop))
            hidden = self._hidden[rows] * multipliers[rows, None].to(self._hidden.dtype)
            for ids in self._tiles(rows):
                tile = self._logit_gradients(rows, ids) if self._kept is None else self._kept[rows, ids]
                total[ids] += product(tile.T, hidden.T)

    def product_with_embedding(self, embedded: Tensor, gradients: Tensor, tokens: Tensor, segments: Segments) -> Tensor:
        """<G_i of the head, G_i of the embedding> where both are one weight: [S] float64.

        Row x_t of the head's G_i is sum_s g_s[x_t] h_s, and the embedding's G_i has d_t there, so the product
        is sum_{s,t} g_s[x_t] (h_s . d_t): only the probabilities of a segment's own tokens are needed.
        embedded [tokens, H] are rows of the weight, gradients [tokens, H] their d_t, tokens [tokens] int64, segments of
        all tokens, prompts included.
        """
        assert self._coefficients is not None, "backward first"
        result = torch.zeros(len(segments), dtype=torch.float64, device=gradients.device)
        policy = self.segments
        for bucket in segments.buckets:
            size, start = policy.sizes[bucket.segments, None], policy.starts[bucket.segments, None]
            inputs = bucket.take(embedded).to(self._hidden.dtype)
            d = bucket.take_padded(gradients).to(self._hidden.dtype)
            ids = bucket.take(tokens)
            step = max(1, self._tile_elements // ids.numel())  # policy tokens of each segment at a time
            for column in torch.arange(int(size.max()), device=gradients.device).split(step):
                rows = (start + column).clamp(max=policy.rows - 1)  # [bucket, step]
                hidden = self._hidden[rows]
                probs = batched_product(hidden, inputs)  # [bucket, step, longest]
                probs = probs.mul_(self._scale).sub_(self._log_normaliser[rows][..., None]).exp_()
                probs -= (self._targets[rows][..., None] == ids[:, None, :]).to(probs.dtype)
                each = (probs * batched_product(hidden, d)).sum(2) * (self._coefficients[rows] * self._scale)
                result[bucket.segments] += torch.where(column < size, each, 0.0).sum(1).double()
        return result

    def _logit_gradients(self, rows: slice, ids: slice) -> Tensor:
        """c_t (pi_t - onehot) / temperature of a tile, [rows, ids], in the dtype of products."""
        assert self._coefficients is not None, "backward first"
        log_normaliser = self._log_normaliser[rows]
        pull = Pull(log_normaliser=log_normaliser, log_prob=-self._coefficients[rows].to(log_normaliser.dtype))
        logits = product(self._hidden[rows], self._weight[ids].to(self._hidden.dtype))
        local = self._targets[rows] - ids.start
        return self._kernels.gradient(logits, local, self._scale, pull, self._hidden.dtype)

    def _blocks(self, first: int) -> Iterator[slice]:
        """Runs of whole segments from `first` on that fill a tile."""
        lengths = self.segments.lengths
        limit = max(self._tile_rows, self._tile_elements // len(self._weight))
        begin, rows = first, 0
        for segment in range(first, len(lengths)):
            if rows and rows + lengths[segment] > limit:
                yield slice(begin, segment)
                begin, rows = segment, 0
            rows += lengths[segment]
        if rows:
            yield slice(begin, len(lengths))

    def _tiles(self, rows: slice) -> Iterator[slice]:
        """Vocabulary ids, so that a tile of these rows stays within its size."""
        vocabulary = len(self._weight)
        width = max(1, self._tile_elements // (rows.stop - rows.start))
        for start in range(0, vocabulary, width):
            yield slice(start, min(vocabulary, start + width))
