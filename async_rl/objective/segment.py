"""Sums, extremes and backward recurrences over contiguous segments of a column, without Python loops."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """[rows] and [rows] int64 -> [segments]; an empty segment is 0."""
    return values.new_zeros(num_segments).index_add_(0, segment, values)


def segment_max(values: Tensor, segment: Tensor, num_segments: int, *, empty: float) -> Tensor:
    """[rows] and [rows] int64 -> [segments]; an empty segment is `empty`."""
    return values.new_full((num_segments,), empty).scatter_reduce_(0, segment, values, "amax", include_self=False)


def segment_min(values: Tensor, segment: Tensor, num_segments: int, *, empty: float) -> Tensor:
    return -segment_max(-values, segment, num_segments, empty=-empty)


def segment_log_sum_exp(log_values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """log sum exp of each segment; -inf when it is empty or all -inf."""
    highest = segment_max(log_values, segment, num_segments, empty=-torch.inf)
    highest = torch.where(torch.isfinite(highest), highest, torch.zeros_like(highest))
    return highest + segment_sum((log_values - highest[segment]).exp(), segment, num_segments).log()


def discounted_suffix_sum(values: Tensor, decay: Tensor, segment: Tensor) -> Tensor:
    """y_t = values_t + decay_t * y_{t+1} within each segment; `decay` is constant in a segment.

    Doubling the reach log2(longest segment) times instead of walking: after step j, y_t holds
    sum_{i < 2^j} decay^i values_{t+i}. `segment` is non-decreasing. All [rows].
    """
    result = values.clone()
    rows = len(values)
    longest = int(torch.bincount(segment).max()) if rows else 0
    reach, power = 1, decay.clone()
    while reach < longest:
        same = segment[:-reach] == segment[reach:]
        ahead = torch.where(same, power[:-reach] * result[reach:], 0.0)
        result = torch.cat([result[:-reach] + ahead, result[-reach:]])
        power = power * power
        reach *= 2
    return result


def next_in_segment(values: Tensor, segment: Tensor, *, last: Tensor) -> Tensor:
    """values_{t+1} within each segment, and `last` [rows] where row t is the last of its segment."""
    if len(values) == 0:
        return values.clone()
    shifted = torch.cat([values[1:], last[-1:]])
    is_last = torch.ones_like(segment, dtype=torch.bool)
    is_last[:-1] = segment[1:] != segment[:-1]
    return torch.where(is_last, last, shifted)
