"""segment_ratio on CUDA: a program takes a trajectory. What it reads again, it has just read: its tokens are in
the first-level cache, so memory sees each column once. No atomics; every sum has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from async_rl_kernels.reference import LARGEST_LOG_RATIO
from async_rl_kernels.segment_ratio import Rule, Turns

LEVELS = {"token": 0, "turn": 1, "sequence": 2}
RULES = {"none": 0, "ppo": 1, "truncate": 2, "interval": 3, "cispo": 4}


@triton.jit
def segment_sum(values, begin, end, BLOCK: tl.constexpr):
    """Sum of values[begin:end]."""
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(begin, end, BLOCK):
        place = at + tl.arange(0, BLOCK)
        total += tl.load(values + place, mask=place < end, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def weighted(
    log, advantage, share, clip_low, clip_high, dual_clip, cap, low, high,
    LARGEST: tl.constexpr, RULE: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """Ratio, clipped, share * weight * advantage of some tokens."""
    ratio = tl.exp(tl.minimum(tl.maximum(log, -LARGEST), LARGEST))
    weight = ratio
    if THROUGH:
        weight = tl.where(tl.abs(log) <= LARGEST, ratio, 0.0)
    clipped = ratio < 0
    if RULE == 1:
        clipped = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))
        clipped = clipped | ((dual_clip > 0) & (advantage < 0) & (ratio > dual_clip))
        weight = tl.where(clipped, 0.0, weight)
    if RULE == 2:
        weight = tl.minimum(ratio, cap)
        clipped = weight != ratio
    if RULE == 3:
        weight = tl.where((ratio >= low) & (ratio <= high), ratio, 0.0)
        clipped = weight != ratio
    if RULE == 4:
        weight = tl.minimum(tl.maximum(ratio, 1 - clip_low), 1 + clip_high)
        clipped = weight != ratio
    return ratio, clipped, share * weight * advantage


@triton.jit
def write_unit(
    log_ratio, advantages, shares, ratios, clips, coefficients, begin, end, total, divisor,
    clip_low, clip_high, dual_clip, cap, low, high,
    BLOCK: tl.constexpr, LARGEST: tl.constexpr, TOKEN: tl.constexpr, RULE: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """Columns of tokens begin..end, which share the log-ratio total / divisor, or with TOKEN have their own."""
    pulled = tl.zeros((BLOCK,), tl.float32)
    for at in range(begin, end, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < end
        advantage = tl.load(advantages + place, mask=inside, other=0.0)
        share = tl.load(shares + place, mask=inside, other=0.0)
        log = tl.zeros((BLOCK,), tl.float32) + total / divisor
        if TOKEN:
            log = tl.load(log_ratio + place, mask=inside, other=0.0)
        ratio, clipped, coefficient = weighted(
            log, advantage, share, clip_low, clip_high, dual_clip, cap, low, high, LARGEST, RULE, THROUGH
        )
        pulled += coefficient
        tl.store(ratios + place, ratio, mask=inside)
        tl.store(clips + place, clipped.to(tl.int8), mask=inside)
        if TOKEN or not THROUGH:
            tl.store(coefficients + place, coefficient, mask=inside)
    if THROUGH and not TOKEN:
        every = tl.sum(pulled, 0) / divisor
        for at in range(begin, end, BLOCK):
            place = at + tl.arange(0, BLOCK)
            tl.store(coefficients + place, tl.zeros((BLOCK,), tl.float32) + every, mask=place < end)


@triton.jit
def ratio_kernel(
    log_ratio, advantages, shares, of_turn, of_trajectory, ratios, clips, coefficients, turn_sums, trajectory_sums,
    clip_low, clip_high, dual_clip, cap, low, high,
    BLOCK: tl.constexpr, LARGEST: tl.constexpr, LEVEL: tl.constexpr, MEAN: tl.constexpr, RULE: tl.constexpr,
    THROUGH: tl.constexpr,
):  # fmt: skip
    trajectory = tl.program_id(0)
    first_turn = tl.load(of_trajectory + trajectory)
    last_turn = tl.load(of_trajectory + trajectory + 1)
    total = tl.zeros((), tl.float32)
    for turn in range(first_turn, last_turn):
        begin = tl.load(of_turn + turn)
        end = tl.load(of_turn + turn + 1)
        of_this = segment_sum(log_ratio, begin, end, BLOCK)
        tl.store(turn_sums + turn, of_this)
        total += of_this
        if LEVEL == 1:
            divisor = tl.maximum(end - begin, 1).to(tl.float32) if MEAN else 1.0
            write_unit(
                log_ratio, advantages, shares, ratios, clips, coefficients, begin, end, of_this, divisor,
                clip_low, clip_high, dual_clip, cap, low, high, BLOCK, LARGEST, False, RULE, THROUGH,
            )  # fmt: skip
    tl.store(trajectory_sums + trajectory, total)
    if LEVEL != 1:
        begin = tl.load(of_turn + first_turn)
        end = tl.load(of_turn + last_turn)
        divisor = tl.maximum(end - begin, 1).to(tl.float32) if MEAN else 1.0
        write_unit(
            log_ratio, advantages, shares, ratios, clips, coefficients, begin, end, total, divisor,
            clip_low, clip_high, dual_clip, cap, low, high, BLOCK, LARGEST, LEVEL == 0, RULE, THROUGH,
        )  # fmt: skip


def segment_ratio_columns(
    log_ratio: Tensor, advantage: Tensor, share: Tensor, turns: Turns, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What reference.segment_ratio answers, in float32."""
    columns = [column.float().contiguous() for column in (log_ratio, advantage, share)]
    tokens, device = len(log_ratio), log_ratio.device
    ratio, coefficient = (torch.empty(tokens, dtype=torch.float32, device=device) for _ in range(2))
    clipped = torch.empty(tokens, dtype=torch.int8, device=device)
    turn_sum = torch.empty(len(turns.turn_lengths), dtype=torch.float32, device=device)
    trajectory_sum = torch.empty(len(turns.turns), dtype=torch.float32, device=device)
    units = turns.turn_lengths if rule.level == "turn" else turns.turns
    block = block_of(tokens // max(1, len(units)))
    if not len(trajectory_sum):
        return ratio, clipped.bool(), coefficient, turn_sum, trajectory_sum
    with torch.cuda.device_of(log_ratio):  # Triton launches on the current device
        ratio_kernel[(len(trajectory_sum),)](
            *columns, turns.of_turn, turns.of_trajectory, ratio, clipped, coefficient, turn_sum, trajectory_sum,
            rule.clip_low, rule.clip_high, rule.dual_clip, rule.cap, rule.low, rule.high,
            BLOCK=block, LARGEST=LARGEST_LOG_RATIO, LEVEL=LEVELS[rule.level], MEAN=rule.pool == "mean",
            RULE=RULES[rule.rule], THROUGH=rule.gradient == "unit" and rule.rule in ("none", "ppo"),
            num_warps=max(1, block // 256),
        )  # fmt: skip
    return ratio, clipped.bool(), coefficient, turn_sum, trajectory_sum


def block_of(mean_length: int) -> int:
    """Tokens held at a time, for units of this mean length."""
    return min(1024, max(32, triton.next_power_of_2(mean_length)))
