"""Log-probs under a distribution from which improbable tokens were taken out (min-p): what Lp-Reg calls the proxy.

Of softmax(hidden . weight / temperature) the tokens are kept whose probability is at least a share of the likeliest
token's, and renormalised. Definition: reference.min_p_log_prob.

Shapes: T tokens, H hidden, V vocabulary. One product with the head, in tiles of whole rows of logits, since the
threshold of a row is known only when all of it is; no gradient.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from async_rl_kernels.logprob import capped, product_dtype, tile_limits
from async_rl_kernels.product import product


@torch.no_grad()
def min_p_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    share: float,
    temperature: float = 1.0,
    cap: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """Log-prob of `targets` [T] int64 under the kept tokens, [T] float32 (float64 for float64 input); -inf where the
    target is not kept.

    Arguments are those of logprob.linear_logprob. share: in (0, 1). Raises ValueError for one that is not.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; it must lie between 0 and 1")
    found = torch.empty(len(hidden), dtype=product_dtype(hidden), device=hidden.device)
    states = hidden.to(products or hidden.dtype)
    head = weight.to(states.dtype)
    rows = max(1, tile_limits(hidden.device)[0] // len(weight))
    for first in range(0, len(hidden), rows):
        tile = slice(first, min(len(hidden), first + rows))
        logits = capped(product(states[tile], head), cap, tile).div_(temperature)
        logits -= logits.amax(1, keepdim=True)
        kept = torch.where(logits >= log(share), logits, -torch.inf)
        chosen = kept.gather(1, targets[tile, None]).squeeze(1)
        found[tile] = chosen - kept.logsumexp(1)
    return found
