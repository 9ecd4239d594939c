"""The block tables against sequences kept as plain lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.generator.kv_blocks import SCRATCH, BlockTables, blocks_for

SLOTS, BLOCKS, SIZE = 4, 14, 4


class Mirror:
    """Tables, a store of what was written into every place, and the histories they must stand for."""

    def __init__(self) -> None:
        self.tables = BlockTables(slots=SLOTS, blocks=BLOCKS, size=SIZE)
        self.store = np.full((BLOCKS, SIZE), -1)
        self.kept: list[list[int]] = [[] for _ in range(SLOTS)]
        """of each slot, the tokens that its chain must hold"""

    def copy(self, copy) -> None:
        if copy is not None:
            assert self.tables.holders[copy.target] == 1
            self.store[copy.target, : copy.tokens] = self.store[copy.source, : copy.tokens]

    def written(self, slot: int, tokens: list[int], block, place) -> None:
        assert len(set(zip(block.tolist(), place.tolist(), strict=True))) == len(tokens)
        assert (self.tables.holders[block] == 1).all()  # nobody else sees what is written
        assert SCRATCH not in block
        self.store[block, place] = tokens
        self.kept[slot] += tokens

    def check(self) -> None:
        tables = self.tables
        holders = np.zeros(BLOCKS, dtype=int)
        for slot, kept in enumerate(self.kept):
            chain = tables.chain(slot)
            found: list[int] = []
            for block in chain:
                assert tables.first[block] == len(found)
                found += self.store[block, : tables.filled[block]].tolist()
            assert found == kept
            assert tables.cached[slot] == len(kept)
            holders[chain] += 1
        assert (tables.holders == holders).all()
        assert tables.free == BLOCKS - 1 - (holders > 0).sum()


action = st.tuples(
    st.sampled_from(["append", "few", "truncate", "match", "share", "clear", "forget"]),
    st.integers(0, SLOTS - 1),
    st.integers(0, SLOTS - 1),
    st.lists(st.integers(0, 1), min_size=1, max_size=9),
    st.integers(0, 20),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(action, max_size=40))
def test_chains_hold_what_was_appended_whatever_is_shared_cut_and_freed(actions):
    mirror = Mirror()
    tables = mirror.tables
    for kind, slot, other, tokens, number in actions:
        one = np.array([slot])
        lacking = int(tables.lacking(one, np.array([len(tokens)]))[0])
        before = tables.free
        if kind == "append" and lacking <= tables.free:
            mirror.written(slot, tokens, *tables.append(slot, np.array(tokens, dtype=np.int32)))
            assert before - tables.free == lacking
        elif kind == "few" and len(tokens) <= SIZE and lacking <= tables.free:
            room = int(tables.room(one)[0])
            if room == 0 or room >= len(tokens):
                found = tables.append_few(one, np.array([len(tokens)]), np.array(tokens, dtype=np.int32))
                mirror.written(slot, tokens, *found)
        elif kind == "truncate":
            tables.settle()
            mirror.copy(tables.truncate(slot, number))
            cut = mirror.kept[slot][:number]
            assert tables.cached[slot] == len(cut) or (not before and tables.cached[slot] < len(cut))
            mirror.kept[slot] = cut[: tables.cached[slot]]
        elif kind == "match" and not mirror.kept[slot]:
            tables.settle()
            mirror.copy(tables.match(slot, np.array(tokens, dtype=np.int32), 1))
            assert tables.cached[slot] <= len(tokens)
            mirror.kept[slot] = tokens[: tables.cached[slot]]
        elif kind == "share" and not mirror.kept[other] and slot != other:
            tables.share(slot, other)
            mirror.kept[other] = list(mirror.kept[slot])
        elif kind == "clear":
            tables.clear(slot)
            mirror.kept[slot] = []
        elif kind == "forget":
            tables.forget()
        mirror.check()
    tables.clear_all()
    assert tables.free == BLOCKS - 1
    assert tables.match(0, np.array([0, 1, 0], dtype=np.int32), 1) is None  # nothing is found that nobody holds
    assert tables.cached[0] == 0


def test_a_beginning_is_found_whole_blocks_by_reference_and_a_part_by_a_copy():
    tables = BlockTables(slots=3, blocks=9, size=4)
    tables.append(0, np.arange(10, dtype=np.int32))
    tables.settle()
    copy = tables.match(1, np.array([0, 1, 2, 3, 4, 5, 6, 99], dtype=np.int32), 2)
    assert copy is not None
    assert copy.tokens == 3
    assert tables.chain(1)[0] == tables.chain(0)[0]
    assert tables.cached[1] == 7
    assert tables.match(2, np.array([0, 1, 2, 3, 4, 99], dtype=np.int32), 2) is None  # one token is not worth a copy
    assert tables.cached[2] == 4


def test_what_is_not_computed_yet_is_shared_but_not_copied():
    tables = BlockTables(slots=2, blocks=9, size=4)
    tables.append(0, np.arange(6, dtype=np.int32))
    assert tables.match(1, np.array([0, 1, 2, 3, 4, 9], dtype=np.int32), 1) is None
    assert tables.cached[1] == 4  # the whole block is written in the same step, before anything attends to it


def test_blocks_of_older_weights_are_not_found():
    tables = BlockTables(slots=3, blocks=9, size=4)
    tables.append(0, np.arange(6, dtype=np.int32))
    tables.settle()
    tables.forget()
    assert not tables.findable(0)
    assert tables.match(1, np.arange(6, dtype=np.int32), 1) is None
    assert tables.cached[1] == 0
    tables.append(0, np.arange(6, 9, dtype=np.int32))  # behind old ones
    tables.append(1, np.arange(6, dtype=np.int32))
    tables.match(2, np.arange(9, dtype=np.int32), 1)
    assert tables.chain(2) == tables.chain(1)


@pytest.mark.parametrize(("tokens", "sequences", "blocks"), [(8, 1, 3), (9, 1, 4), (8, 5, 11)])
def test_the_blocks_of_sequences_that_share_nothing(tokens, sequences, blocks):
    assert blocks_for(tokens, 4, sequences) == blocks
