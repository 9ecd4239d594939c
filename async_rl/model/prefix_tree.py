"""Documents that begin alike, as one tree: each common beginning is one run of rows, whoever shares it.

A document is a sequence of tokens that the model sees alone (a context of a trajectory). The rows of a tree are the
tokens that remain when every shared beginning is kept once. A causal model computes the same hidden state for a token
of each document that has it, since that depends on the tokens before it and on its position only.

Free of torch: the division of work over ranks counts rows with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

SHORTEST = 8
"""tokens: a shorter common beginning is computed for every document anew, since each run costs calls of attention"""

MOST_TABLE = 1 << 20
"""numbers; documents of fewer, when each is as long as the longest, are compared at once"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Rows begin <= row < end that the same documents share, and those that follow them, up to `last`.

    Rows of a tree lie in depth-first order, so the rows end <= row < last are exactly those whose tokens have this run
    before them.
    """

    begin: int
    end: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixTree:
    """Where the tokens of packed documents lie among the rows that are computed.

    Example: documents [1, 2, 3] and [1, 2, 4, 5] have the rows [1, 2 | 3 | 4, 5] where beginnings of two tokens are
    shared: runs (0, 2, 5), (2, 3, 3), (3, 5, 5), and row_of_token is [0, 1, 2, 0, 1, 3, 4].
    """

    runs: tuple[Run, ...]
    """none is empty; together they are all rows, in order"""
    documents: tuple[int, ...]
    """tokens of each document"""
    row_of_token: NDArray[np.int64] = field(repr=False)  # [tokens]
    """row of each token of the documents, one document behind the other"""
    token_of_row: NDArray[np.int64] = field(repr=False)  # [rows]
    """one of the tokens that the row stands for: the first document's"""

    @property
    def num_rows(self) -> int:
        return len(self.token_of_row)


def make_tree(
    documents: Sequence[NDArray[np.int32]],
    *,
    groups: Sequence[int] | None = None,
    planned: Sequence[int] | None = None,
    shortest: int = SHORTEST,
) -> PrefixTree:
    """The tree of documents, each of one token at least. Runs of less than `shortest` tokens are not shared.

    planned: of each document, tokens that are shared with all documents of its group (`groups`) in any case, even where
    other groups share so much of them that a short run remains: rows are counted so.
    """
    groups = [0] * len(documents) if groups is None else groups
    planned = [0] * len(documents) if planned is None else planned
    lengths = [len(d) for d in documents]
    starts = [0, *accumulate(lengths)]
    order, common = _sorted(documents, starts)
    rows_of: list[tuple[int, int, int]] = []  # (first token, first row, tokens) of each document in each run
    runs: list[tuple[int, int]] = []  # (begin, end)
    first_token: list[int] = []  # of each run
    last_of: dict[int, int] = {}  # number of a run -> last
    rows = 0

    # (low, high, begin): documents order[low:high], whose first `begin` tokens have rows; a number: of a run to close
    stack: list[tuple[int, int, int] | int] = [(0, len(order), 0)]
    while stack:
        item = stack.pop()
        if isinstance(item, int):
            last_of[item] = rows
            continue
        low, high, begin = item
        first, alone, at = order[low], high - low == 1, begin
        shared = len(documents[first]) if alone else min(common[low + 1 : high])
        chosen = alone or shared - begin >= shortest
        if not chosen and begin < planned[first]:
            chosen = all(groups[i] == groups[first] for i in order[low:high])
        if chosen and shared > begin:
            first_token.append(starts[first] + begin)
            rows_of += [(starts[i] + begin, rows, shared - begin) for i in order[low:high]]
            runs.append((rows, rows + shared - begin))
            rows += shared - begin
            stack.append(len(runs) - 1)
            at = shared
        if not alone:
            cuts = [low, *(i for i in range(low + 1, high) if common[i] == shared), high]
            stack.extend((a, b, at) for a, b in reversed(list(pairwise(cuts))))
    token, row, count = np.array(rows_of, np.int64).reshape(-1, 3).T
    row_of_token = np.empty(starts[-1], np.int64)
    row_of_token[_ranges(token, count)] = _ranges(row, count)
    return PrefixTree(
        runs=tuple([Run(begin=b, end=e, last=last_of[n]) for n, (b, e) in enumerate(runs)]),
        documents=tuple(lengths),
        row_of_token=row_of_token,
        token_of_row=_ranges(np.array(first_token, np.int64), np.array([e - b for b, e in runs], np.int64)),
    )


def _sorted(documents: Sequence[NDArray[np.int32]], starts: Sequence[int]) -> tuple[list[int], list[int]]:
    """The documents in order of their tokens, and how many each has in common with the one before it there. `starts`:
    [documents + 1], where each would begin if they lay one behind the other."""
    tokens = np.concatenate(documents) if documents else np.zeros(0, np.int32)
    keys = tokens.astype(">i4").tobytes()
    order = sorted(range(len(documents)), key=lambda i: keys[4 * starts[i] : 4 * starts[i + 1]])
    longest = max(map(len, documents), default=0)
    if longest * len(documents) > MOST_TABLE:
        return order, [0] + [shared_tokens(documents[a], documents[b]) for a, b in pairwise(order)]
    length = np.diff(np.array(starts))[order]
    table = np.full((len(order), longest + 1), -1, tokens.dtype)  # the last column is equal nowhere
    table[np.repeat(np.arange(len(order)), length), _ranges(np.zeros_like(length), length)] = tokens[
        _ranges(np.array(starts)[order], length)
    ]
    differs = table[1:] != table[:-1]
    differs[:, -1] = True
    least = np.minimum(length[1:], length[:-1])
    return order, [0, *np.minimum(differs.argmax(1), least).tolist()]


def _ranges(start: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:  # [sum of count]
    """start[0], start[0] + 1, ..., start[1], ...: `count[i]` numbers from `start[i]` on."""
    return np.arange(int(count.sum())) + np.repeat(start - (count.cumsum() - count), count)


def shared_tokens(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Tokens of the common beginning of two documents."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length


def common_beginning(documents: Sequence[NDArray[np.int32]], shortest: int = SHORTEST) -> int:
    """Tokens that all documents begin with; 0 where they are fewer than `shortest`."""
    head = documents[0][:shortest].tobytes()
    if any(d[:shortest].tobytes() != head for d in documents[1:]):
        return 0
    found = min((shared_tokens(documents[0], d) for d in documents[1:]), default=0)
    return found if found >= shortest else 0
