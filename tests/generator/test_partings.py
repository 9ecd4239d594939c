"""Where blocks are to end, so that histories that begin alike share what they have in common."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.generator.partings import partings

histories = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple), max_size=12, unique=True)


def in_common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@settings(max_examples=300, deadline=None)
@given(histories, st.integers(1, 5))
def test_two_histories_share_all_but_a_few_of_the_tokens_that_both_begin_with(found, least):
    ends = partings([np.array(one, dtype=np.int32) for one in found], least)
    assert all(b - a >= least for each in ends for a, b in pairwise([0, *each]))
    for i, j in combinations(range(len(found)), 2):
        common = in_common(found[i], found[j])
        shared = [end for end in ends[i] if end <= common]
        assert shared == [end for end in ends[j] if end <= common]  # the same blocks
        assert common - max(shared, default=0) < least


def test_a_history_alone_has_no_ends():
    assert partings([], 4) == []
    assert partings([np.arange(20, dtype=np.int32)], 4) == [[]]
