"""Sampling by inverse CDF with one counter-based uniform a token.

The uniform is a function of (seed, position) alone, so neither the batch a token shares, nor the order
in which requests came, nor an interruption changes what is sampled.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 1024
"""tokens of a block in the two-level search of large vocabularies"""


def uniforms(seed: NDArray[np.uint64], position: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): SplitMix64 (Steele et al. 2014) of both."""
    state = _mix(seed + GOLDEN) + GOLDEN * (position.astype(np.uint64) + np.uint64(1))
    # 52 bits: u <= 1 - 2**-52, so that u * total never rounds up to total.
    return (_mix(state) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def sample(
    logits: Tensor, temperature: NDArray[np.float32], uniform: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """A token of each row and its log-prob.

    logits [rows, vocabulary]; temperature and uniform [rows]. Returns tokens [rows] int64 and log-probs
    [rows] float32 of the distribution sampled from. Temperature 0 takes the likeliest token and gives
    its log-prob at temperature 1.
    """
    logits = logits.float()
    greedy = temperature == 0
    if (temperature != 1).any():
        divisor = torch.from_numpy(np.where(greedy, 1, temperature).astype(np.float32))
        logits = logits / divisor.to(logits.device)[:, None]
    log_probs = torch.log_softmax(logits, -1)
    if greedy.all():
        tokens = log_probs.argmax(-1)
    else:
        tokens = inverse_cdf(log_probs.exp(), torch.from_numpy(uniform).to(logits.device))
        if greedy.any():
            at = torch.from_numpy(greedy).to(logits.device)
            tokens = torch.where(at, log_probs.argmax(-1), tokens)
    return tokens, log_probs.gather(1, tokens[:, None]).squeeze(1)


def inverse_cdf(prob: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative probability (float64) exceeds `uniform` of the row's total.

    prob [rows, vocabulary] float32, uniform [rows] float64. The answer never has probability 0. Large
    vocabularies are searched in two levels, so that only one block a row is summed up in float64.
    """
    vocabulary = prob.shape[1]
    if vocabulary <= 4 * BLOCK:
        cumulative = prob.cumsum(-1, dtype=torch.float64)
        return _exceeding(cumulative, uniform * cumulative[:, -1])
    padded = torch.nn.functional.pad(prob, (0, -vocabulary % BLOCK)).view(prob.shape[0], -1, BLOCK)
    ends = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform * ends[:, -1]
    block = _exceeding(ends, target)
    rows = torch.arange(prob.shape[0], device=prob.device)
    before = torch.where(block > 0, ends[rows, (block - 1).clamp_min(0)], 0.0)
    inside = padded[rows, block].cumsum(-1, dtype=torch.float64)
    # Both sums are rounded differently: the target must not lie beyond the block.
    last = torch.nextafter(inside[:, -1], torch.zeros_like(target))
    return block * BLOCK + _exceeding(inside, torch.minimum(target - before, last))


def _exceeding(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index of the first element above `target`, which is below the last one. The clamp only acts on
    NaN, whose log-prob the caller refuses."""
    found = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    return found.clamp_max(cumulative.shape[1] - 1)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
