"""Which blocks of the KV cache hold which tokens of which sequence.

The cache is cut into blocks of equally many places. A sequence holds a chain of blocks; several hold a block together
when their histories begin alike. A block may be filled in part and be followed by another one: a sequence writes only
into its last block, and only while it alone holds it. So nothing is copied when sequences that share a beginning part
(the block they share stays as it is, each goes on in one of its own), except where a history ends or differs inside a
shared block.

Blocks are found again by their tokens: every block written under the weights of now is a child of the block before it.
Nothing here knows tensors: the caller carries out the copies that it is told.

Shapes: slots are places of sequences, columns the blocks of the longest chain.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
BLOCK = 32
"""places of a block of the engine's cache: torch's CPU products of a few queries with so many keys are as fast as with
more"""
CACHE_BYTES = 2 << 30
"""largest KV cache unless it is set"""
SCRATCH = 0
"""a block that no sequence holds: what is written there is never read"""
ROOT = 0
"""what the first blocks of histories are children of"""
FIRST_COLUMNS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """The first `tokens` places of block `source`, to be copied to those of `target` before anything is written."""

    source: int
    target: int
    tokens: int


class BlockTables:
    """The chain of blocks of every slot, and the tokens in every block."""

    def __init__(self, *, slots: int, blocks: int, size: int) -> None:
        """`blocks`: how many there are in all, the scratch block among them; `size`: places of one."""
        self.size = size
        self.blocks = blocks
        # [blocks]
        self.holders = np.zeros(blocks, dtype=np.int64)
        self.filled = np.zeros(blocks, dtype=np.int64)
        """places in use"""
        self._settled = np.zeros(blocks, dtype=np.int64)
        """of these, places whose keys and values were there before this step"""
        self.first = np.zeros(blocks, dtype=np.int64)
        """position of the first place in its sequences"""
        self.tokens = np.zeros((blocks, size), dtype=np.int32)
        self._number = np.zeros(blocks, dtype=np.int64)
        """of this use of the block, never given twice; -1: not to be found by its tokens"""
        self._parent = np.zeros(blocks, dtype=np.int64)
        # [slots]
        self.length = np.zeros(slots, dtype=np.int64)
        """blocks of the chain"""
        self.cached = np.zeros(slots, dtype=np.int64)
        """tokens of the chain"""
        self.table = np.zeros((slots, FIRST_COLUMNS), dtype=np.int64)
        """[slots, columns]: the chains"""
        self._children: dict[int, list[int]] = {}
        self._returned: list[int] = []
        self._untouched = SCRATCH + 1
        self._uses = ROOT
        self.changes = 0
        """how often a chain has become longer or shorter"""

    @property
    def free(self) -> int:
        """blocks that no sequence holds"""
        return self.blocks - self._untouched + len(self._returned)

    @property
    def touched(self) -> int:
        """blocks up to the highest one ever used"""
        return self._untouched

    def chain(self, slot: int) -> list[int]:
        found: list[int] = self.table[slot, : self.length[slot]].tolist()
        return found

    def lacking(self, slot: Ints, count: Ints) -> Ints:
        """How many blocks each of `slot` [n] takes when `count` [n] tokens are appended."""
        return -(-np.maximum(count - self.room(slot), 0) // self.size)

    def room(self, slot: Ints) -> Ints:
        """Tokens that each of `slot` [n] can write into its last block."""
        length = self.length[slot]
        last = self.table[slot, np.maximum(length - 1, 0)]
        writable = (length > 0) & (self.holders[last] == 1)
        return np.where(writable, self.size - self.filled[last], 0)

    def append(self, slot: int, tokens: NDArray[np.int32], ends: Sequence[int] = ()) -> tuple[Ints, Ints]:
        """(blocks, places in them), both [tokens], of tokens appended to a slot. There must be blocks enough. `ends`:
        numbers of tokens behind which another block begins, ascending."""
        blocks = np.empty(len(tokens), dtype=np.int64)
        places = np.empty(len(tokens), dtype=np.int64)
        begin = 0
        for last in (*ends, len(tokens)):
            if begin:
                self._extend(slot)
            while begin < last:
                if not self.room(np.array([slot])).any():
                    self._extend(slot)
                block = int(self.table[slot, self.length[slot] - 1])
                at = int(self.filled[block])
                end = min(last, begin + self.size - at)
                self.tokens[block, at : at + end - begin] = tokens[begin:end]
                blocks[begin:end] = block
                places[begin:end] = np.arange(at, at + end - begin)
                self.filled[block] += end - begin
                self.cached[slot] += end - begin
                begin = end
        return blocks, places

    def append_few(self, slot: Ints, count: Ints, tokens: NDArray[np.int32]) -> tuple[Ints, Ints]:
        """`append` of `count` [n] tokens to each of `slot` [n]: (blocks, places) of all `tokens`, slot by slot. Each
        slot's fit into its last block, or that has no room at all and they fit into a new one."""
        for some in slot[self.room(slot) == 0]:
            self._extend(int(some))
        last = self.table[slot, self.length[slot] - 1]
        block = np.repeat(last, count)
        place = np.arange(len(block)) + np.repeat(self.filled[last] - (count.cumsum() - count), count)
        self.tokens[block, place] = tokens
        self.filled[last] += count
        self.cached[slot] += count
        return block, place

    def truncate(self, slot: int, tokens: int) -> BlockCopy | None:
        """Keep the first `tokens` of a slot, or fewer where a shared block would have to be copied and none is free."""
        while self.length[slot]:
            block = int(self.table[slot, self.length[slot] - 1])
            kept = tokens - int(self.first[block])
            if kept >= self.filled[block]:
                return None
            if kept > 0 and self.holders[block] == 1:
                self.cached[slot] -= self.filled[block] - kept
                self.filled[block] = kept
                self._settled[block] = min(kept, self._settled[block])
                return None
            self._shorten(slot)
            if kept > 0:
                return self._copied(slot, block, kept)
        return None

    def match(self, slot: int, history: NDArray[np.int32], least: int) -> BlockCopy | None:
        """Give an empty slot the longest beginning of `history` that is in blocks already, or will be within this step.
        Part of a block, which costs a copy, is taken from `least` tokens on that are there."""
        assert not self.length[slot]
        parent, at = ROOT, 0
        while at < len(history):
            children = self._children.get(parent)
            if not children:
                return None
            rest = history[at : at + self.size]
            among = np.array(children)
            equal = self.tokens[among, : len(rest)] == rest
            equal &= np.arange(len(rest)) < self.filled[among, None]
            alike = np.where(equal.all(1), len(rest), equal.argmin(1))  # [children]
            best = int((2 * alike + (alike == self.filled[among])).argmax())  # of two a whole one
            block, tokens = int(among[best]), int(alike[best])
            if tokens == 0:
                return None
            if tokens < self.filled[block]:
                tokens = min(tokens, int(self._settled[block]))
                return self._copied(slot, block, tokens) if tokens >= least else None
            self._attach(slot, block)
            parent, at = int(self._number[block]), at + tokens
        return None

    def share(self, slot: int, other: int) -> None:
        """Give the empty slot `other` the whole chain of `slot`."""
        assert not self.length[other]
        for block in self.chain(slot):
            self._attach(other, block)

    def settle(self) -> None:
        """The keys and values of all that was appended are in the cache now."""
        self._settled[: self._untouched] = self.filled[: self._untouched]

    def findable(self, slot: int) -> bool:
        """Whether the blocks of a slot are all found by their tokens: none is older than the weights."""
        return not self.length[slot] or bool(self._number[self.table[slot, self.length[slot] - 1]] >= 0)

    def clear(self, slot: int) -> None:
        while self.length[slot]:
            self._shorten(slot)

    def clear_all(self) -> None:
        for slot in np.flatnonzero(self.length).tolist():
            self.clear(slot)

    def forget(self) -> None:
        """Blocks are no longer found by their tokens: the weights have changed. Their sequences keep them."""
        self._children.clear()
        self._number[:] = -1

    def _extend(self, slot: int) -> int:
        """Put a free block behind a chain."""
        block = heapq.heappop(self._returned) if self._returned else self._untouched
        assert block < self.blocks, "no block is free"
        self._untouched = max(self._untouched, block + 1)
        parent = ROOT
        if self.length[slot]:
            parent = int(self._number[self.table[slot, self.length[slot] - 1]])
        self.filled[block] = self._settled[block] = 0
        self.first[block] = self.cached[slot]
        self._parent[block] = parent
        self._uses += 1
        self._number[block] = self._uses if parent >= 0 else -1
        if parent >= 0:
            self._children.setdefault(parent, []).append(block)
        self._attach(slot, block)
        return block

    def _copied(self, slot: int, source: int, tokens: int) -> BlockCopy | None:
        """A block of its own for the slot with the first `tokens` of `source`; None when no block is free."""
        if not self.free:
            return None
        self.holders[source] += 1  # it must not be the block that is taken
        block = self._extend(slot)
        self.holders[source] -= 1
        self.tokens[block, :tokens] = self.tokens[source, :tokens]
        self.filled[block] = self._settled[block] = tokens
        self.cached[slot] += tokens
        return BlockCopy(source=source, target=block, tokens=tokens)

    def _attach(self, slot: int, block: int) -> None:
        self.changes += 1
        column = int(self.length[slot])
        if column == self.table.shape[1]:
            self.table = np.concatenate((self.table, np.zeros_like(self.table)), 1)
        self.table[slot, column] = block
        self.length[slot] += 1
        self.cached[slot] += self.filled[block]
        self.holders[block] += 1

    def _shorten(self, slot: int) -> None:
        """Take the last block off a chain; it is free when nobody else holds it."""
        self.changes += 1
        self.length[slot] -= 1
        block = int(self.table[slot, self.length[slot]])
        self.cached[slot] -= self.filled[block]
        self.holders[block] -= 1
        if self.holders[block]:
            return
        if self._number[block] >= 0:
            siblings = self._children[int(self._parent[block])]
            siblings.remove(block)
            if not siblings:
                del self._children[int(self._parent[block])]
        heapq.heappush(self._returned, block)


def blocks_for(tokens: int, size: int, sequences: int = 1) -> int:
    """Blocks that so many sequences of so many tokens take at most when they share nothing, the scratch block among
    them."""
    return SCRATCH + 1 + sequences * -(-tokens // size)


def block_bytes(layers: int, kv_heads: int, head_dim: int, item_bytes: int) -> int:
    """Bytes of one block's keys and values in all layers."""
    return 2 * layers * kv_heads * head_dim * BLOCK * item_bytes


def cache_blocks(each: int, max_sequences: int, max_context: int, cache_bytes: int = 0) -> int:
    """Blocks, of `each` bytes, of a cache of at most `cache_bytes` (0: CACHE_BYTES): no more than `max_sequences` of
    `max_context` tokens take, and no fewer than one does."""
    most = blocks_for(max_context, BLOCK, max_sequences)
    return max(blocks_for(max_context, BLOCK), min(most, (cache_bytes or CACHE_BYTES) // each))
