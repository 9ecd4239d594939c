"""Steps of a small model that nothing comes between, in one compiled function."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from async_rl.generator.kv_blocks import BlockTables, Ints
from async_rl.generator.kv_cache import CacheAttention, KVCache, address
from async_rl.generator.sampling import BLOCK, StopRules
from async_rl.generator.slots import Slots
from async_rl.model.fused_decoder import CachedStep, FusedDecoder
from async_rl_kernels import native

MOST_TOKENS = 4 * BLOCK
"""of a vocabulary whose tokens `sampling.sample` draws by the same compiled function"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What came of some steps."""

    steps: int
    token: Ints  # [rows]
    """drawn in the last one"""
    log_prob: NDArray[np.float32]  # [rows]
    """theirs; where it is not finite, the token is not noted"""


class FurtherSteps:
    """Feeds to every row of a step the token that it has sampled, and samples the next, again and again: to arrange a
    step anew takes longer than to take it."""

    def __init__(
        self, slots: Slots, tables: BlockTables, rules: StopRules, cache: KVCache, forward: FusedDecoder
    ) -> None:
        self._slots, self._tables, self._cache, self._forward = slots, tables, cache, forward
        self._arguments = native.Steps(
            tokens=address(slots.tokens), versions=address(slots.versions), log_probs=address(slots.log_probs),
            context=slots.tokens.shape[1], known=address(slots.known), limit=address(slots.limit),
            rule=address(slots.rule), seed=address(slots.seed), temperature=address(slots.temperature),
            ends=address(rules.ends), maybe=address(rules.maybe), filled=address(tables.filled),
            cached=address(tables.cached), block_tokens=address(tables.tokens),
        )  # fmt: skip

    @classmethod
    def made(
        cls, slots: Slots, tables: BlockTables, rules: StopRules, cache: KVCache, forward: FusedDecoder
    ) -> FurtherSteps | None:
        """None where there is no compiled function, or it does not draw from so large a vocabulary."""
        serves = cache.compiled is not None and forward.at_once and forward.decoder.config.vocabulary <= MOST_TOKENS
        return cls(slots, tables, rules, cache, forward) if serves else None

    def take(self, attention: CacheAttention, version: int, seconds: float) -> Taken | None:
        """Steps behind that of `attention`, in which every row was fed one token, until a turn may be over, a block is
        full, or `seconds` have passed; `version`: of the weights. None where a block is full already."""
        assert attention.at_once is not None
        assert self._cache.compiled is not None
        tables, slot, position = self._tables, attention.slot, attention.position
        most, rows = int(tables.room(slot).min()), len(slot)
        if not most:
            return None
        block = tables.table[slot, tables.length[slot] - 1]
        token, place, drawn = np.empty((3, rows), dtype=np.int64)
        uniform = np.empty(rows)
        heat, log_prob = np.empty((2, rows), dtype=np.float32)
        step = CachedStep(
            tokens=torch.from_numpy(token),
            positions=torch.from_numpy(position),
            last=np.arange(rows),
            attention=attention.at_once,
            places=(address(block), address(place)),
            keys=self._cache.key,
            values=self._cache.value,
        )
        decode, _logits = self._forward.argument(step)
        chosen = self._arguments
        chosen.decode, chosen.attention = ctypes.pointer(decode), ctypes.pointer(attention.at_once)
        chosen.most, chosen.seconds, chosen.version = most, seconds, version
        chosen.token, chosen.position, chosen.place, chosen.block = map(address, (token, position, place, block))
        chosen.uniform, chosen.drawn = address(uniform), address(drawn)
        chosen.heat, chosen.log_prob = address(heat), address(log_prob)
        return Taken(steps=self._cache.compiled.take_steps(chosen), token=drawn, log_prob=log_prob)
