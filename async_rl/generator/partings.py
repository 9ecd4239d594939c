"""Where the histories of a step part: up to there one of them is computed for all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from async_rl.model.prefix_tree import shared_tokens


def partings(histories: Sequence[NDArray[np.int32]], least: int) -> list[list[int]]:
    """For each history [tokens], all different: after how many of its tokens a block is to end, ascending, so that
    blocks hold what it has in common with others and nothing else. Between two ends, and before the first, there are
    `least` tokens at least."""
    order = sorted(range(len(histories)), key=lambda i: histories[i].tobytes())
    common = [shared_tokens(histories[i], histories[j]) for i, j in pairwise(order)]
    ends: list[list[int]] = [[] for _ in histories]
    todo = [(0, len(order), 0)]  # histories begin <= i < last in this order have so many tokens in common
    while todo:
        begin, last, depth = todo.pop()
        if last - begin < 2:
            continue
        nearest = min(common[begin : last - 1])
        if nearest >= depth + least:
            depth = nearest
            for i in order[begin:last]:
                ends[i].append(depth)
        for i in range(begin, last - 1):
            if common[i] < depth + least:
                todo.append((begin, i + 1, depth))
                begin = i + 1
        todo.append((begin, last, depth))
    return ends
