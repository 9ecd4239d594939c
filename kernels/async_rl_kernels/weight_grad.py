"""Of a linear layer's weight gradients G_i, one for each trajectory: |G_i|^2, sum G_i and sum m_i G_i at once.

For uses that know the multipliers beforehand. A baseline is known only after the norms of all layers: the trainer
takes `weight_norm_squares` first and one product afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from async_rl_kernels.device import uses_triton_products
from async_rl_kernels.product import product
from async_rl_kernels.segment_gradient import Segments, weight_norm_squares

FILLED = 1.5
"""rows with those that fill up the last blocks of segments, over rows: above, two products cost less"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGrad:
    norm_squares: Tensor  # [segments] float64, |G_i|^2
    total: Tensor  # [out, in], sum G_i
    weighted: Tensor  # [out, in], sum m_i G_i


@torch.no_grad()
def segmented_weight_grad(
    activations: Tensor, gradients: Tensor, segments: Segments, multipliers: Tensor, *, dtype: torch.dtype | None = None
) -> WeightGrad:
    """activations [rows, in], gradients [rows, out] of one float dtype, multipliers [segments].

    dtype: of the two sums (as the inputs), which are float32 or better inside. On CUDA one pass over the rows with
    the products of one weight gradient. Definition: reference.segmented_weight_grad.
    """
    assert activations.shape[0] == gradients.shape[0] == segments.rows
    dtype = dtype or activations.dtype
    if uses_triton_products(activations) and segments.rows:
        from async_rl_kernels import segment_gradient_triton as fast

        step = fast.TOTALS_TILE.rows
        if sum(-(-n // step) * step for n in segments.lengths) <= FILLED * segments.rows:
            squares, total, weighted = fast.weight_grad(activations, gradients, segments, multipliers, dtype)
            return WeightGrad(norm_squares=squares, total=total, weighted=weighted)
    scaled = (gradients * multipliers[segments.ids, None]).to(gradients.dtype)
    return WeightGrad(
        norm_squares=weight_norm_squares(activations, [gradients], segments),
        total=product(gradients.T, activations.T).to(dtype),
        weighted=product(scaled.T, activations.T).to(dtype),
    )
