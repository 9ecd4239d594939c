"""Which tokens of which sequences the next step feeds, and into which blocks of the cache.

Decoding sequences are fed one token each. Prompts and appended text are fed within the prefill budget, oldest requests
first; what another sequence has cached already, or is fed in the same step, is not fed again. A sequence that lacks a
block takes it from idle sessions, then from the youngest running sequence, whose cache is built again later; the oldest
one always gets on, so nobody waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from async_rl.generator.kv_blocks import SCRATCH, BlockCopy, BlockTables, Ints
from async_rl.generator.kv_cache import SMALL_APPEND, Feed
from async_rl.generator.partings import partings
from async_rl.generator.slots import Slots

LEAST_SHARED = 16
"""tokens; a shorter beginning is not looked for, and no shorter part of a block is copied: feeding it costs as much"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step's tokens."""

    feed: Feed
    block: Ints  # [tokens]: where each is written
    place: Ints  # [tokens]
    copies: tuple[BlockCopy, ...]
    """to be carried out first, in order"""
    twins: tuple[tuple[int, int], ...]
    """(slot, row): a slot whose history is that of a fed row, so that the row's logits are its own, too"""


class _Draft:
    """A step in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """prefill tokens left"""
        self.slots: list[int] = []
        """of the rows"""
        self.start: list[int] = []
        self.count: list[int] = []
        self.block: list[Ints] = []
        self.place: list[Ints] = []
        self.copies: list[BlockCopy] = []
        self.twins: list[tuple[int, int]] = []
        self.whole: dict[bytes, int] = {}
        """history, as bytes -> the row that completes it"""

    def put(self, slot: list[int], start: list[int], count: list[int], block: Ints, place: Ints) -> None:
        """Add rows; `block` and `place` [tokens] row by row."""
        self.slots += slot
        self.start += start
        self.count += count
        self.block.append(block)
        self.place.append(place)
        self.budget -= len(block) - len(slot)

    def put_one(self, slot: int, start: int, block: Ints, place: Ints, whole: bytes | None) -> None:
        """Add a row. `whole`: the history that it completes, if it does."""
        if whole is not None:
            self.whole[whole] = len(self.slots)
        self.put([slot], [start], [len(block)], block, place)

    def step(self) -> Step:
        feed = Feed(slot=np.array(self.slots), start=np.array(self.start), count=np.array(self.count))
        return Step(
            feed=feed,
            block=np.concatenate(self.block),
            place=np.concatenate(self.place),
            copies=tuple(self.copies),
            twins=tuple(self.twins),
        )


class Scheduler:
    """Makes the steps of an engine. The tables are kept up: what a step feeds is in them when it is made."""

    def __init__(self, slots: Slots, tables: BlockTables, prefill_tokens: int) -> None:
        self._slots, self._tables, self._prefill_tokens = slots, tables, prefill_tokens

    def next_step(self) -> Step:
        """There is a running slot at least."""
        order = self._slots.by_arrival()
        few = self._few(order)
        draft = _Draft(self._prefill_tokens)
        if few.any():
            self._feed_few(draft, order[few])
        rest, preemptable = order[~few].tolist(), not few.any()
        ends = self._ends(rest)
        for i, slot in enumerate(rest):
            self._feed(draft, slot, rest[i + 1 :] if preemptable else [], ends.get(slot, []))
        return draft.step()

    def _ends(self, slots: list[int]) -> dict[int, list[int]]:
        """Where blocks are to end, of slots that begin, so that others find what they have in common with them."""
        held, begins = self._slots, [slot for slot in slots if not self._tables.length[slot]]
        different = {
            held.tokens[slot, : held.known[slot]].tobytes(): slot
            for slot in reversed(begins)
            if held.known[slot] > LEAST_SHARED
        }
        if len(different) < 2:
            return {}
        first = list(different.values())  # of those with one history the first is fed
        return dict(zip(first, partings([held.tokens[s, : held.known[s]] for s in first], LEAST_SHARED), strict=True))

    def _few(self, order: Ints) -> NDArray[np.bool_]:
        """Which running slots [n] lack so few tokens that they are fed together: none if budget or blocks are short."""
        slots, tables = self._slots, self._tables
        known, room = slots.known[order], tables.room(order)
        lacks = known - tables.cached[order]
        few = (lacks > 0) & (lacks <= SMALL_APPEND) & ((room >= lacks) | (room == 0))
        few &= (tables.length[order] > 0) | (known < LEAST_SHARED)
        blocks = int((room[few] == 0).sum())
        enough = blocks <= tables.free and int((lacks[few] - 1).sum()) <= self._prefill_tokens
        return few if enough else np.zeros_like(few)

    def _feed_few(self, draft: _Draft, slot: Ints) -> None:
        slots, tables = self._slots, self._tables
        column = np.maximum(tables.length[slot] - 1, 0)
        # by block: attention reads what they share once, and finds the others in order
        slot = slot[np.lexsort((tables.table[slot, column], tables.table[slot, 0]))]
        start = tables.cached[slot].copy()
        count = slots.known[slot] - start
        row = np.repeat(np.arange(len(slot)), count)
        position = np.arange(len(row)) + (start - (count.cumsum() - count))[row]
        block, place = tables.append_few(slot, count, slots.tokens[slot[row], position])
        draft.put(slot.tolist(), start.tolist(), count.tolist(), block, place)

    def _feed(self, draft: _Draft, slot: int, younger: list[int], ends: list[int]) -> None:
        """Add a slot to the step, as far as budget and blocks allow. `younger`: slots that may lose their blocks;
        `ends`: numbers of tokens behind which a block is to end."""
        slots, tables = self._slots, self._tables
        known, oldest = int(slots.known[slot]), not draft.slots
        history = slots.tokens[slot, :known]
        begins, key = not tables.length[slot], history.tobytes()
        if begins:
            row = draft.whole.get(key)
            if row is not None and tables.findable(draft.slots[row]):
                tables.share(draft.slots[row], slot)
                draft.twins.append((slot, row))
                return
            if draft.budget <= 0:
                return
            if (copy := tables.match(slot, history, LEAST_SHARED)) is not None:
                draft.copies.append(copy)
        lacks = known - int(tables.cached[slot])
        count = min(lacks, draft.budget + 1)
        if lacks == 0:  # all of it is in blocks: the last token is fed for its logits, and written nowhere
            draft.put_one(slot, known - 1, np.array([SCRATCH]), np.array([0]), key)
            return
        if lacks > 1 and draft.budget <= 0:
            return
        start = int(tables.cached[slot])
        ends = [end - start for end in ends if start < end < start + count]
        need = int(tables.lacking(np.array([slot]), np.array([count]))[0]) + len(ends)
        if begins and not oldest:  # one that only begins leaves a block to each of the others, and takes none away
            need, younger = need + len(draft.slots), []
        if not self._make_room(need, younger):
            if begins or oldest:
                tables.clear(slot)
            if not oldest:
                return
            count, ends = min(known, draft.budget + 1), []  # it is alone now, and its chain had gaps
        start = int(tables.cached[slot])
        block, place = tables.append(slot, history[start : start + count], ends)
        draft.put_one(slot, start, block, place, key if start + count == known else None)

    def _make_room(self, need: int, younger: list[int]) -> bool:
        """Free blocks until `need` are free: of idle sessions first, then of `younger` slots, the youngest first."""
        tables = self._tables
        while tables.free < need:
            if self._slots.forget_idle():
                continue
            held = [other for other in younger if tables.length[other]]
            if not held:
                return False
            tables.clear(held[-1])
        return True
