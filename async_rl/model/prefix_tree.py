"""Documents that begin alike, as one tree: each common beginning is one run of rows, whoever shares it.

A document is a sequence of tokens that the model sees alone (a context of a trajectory). The rows of a tree are the
tokens that remain when every shared beginning is kept once. A causal model computes the same hidden state for a token
of each document that has it, since that depends on the tokens before it and on its position only.

Free of torch: the division of work over ranks counts rows with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SHORTEST = 8
"""tokens: a shorter common beginning is computed for every document anew, since each run costs calls of attention"""


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
    lengths = np.array([len(d) for d in documents], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    order = sorted(range(len(documents)), key=lambda i: documents[i].astype(">i4").tobytes())
    common = [0] + [shared_tokens(documents[a], documents[b]) for a, b in pairwise(order)]  # with the one before
    row_of_token = np.empty(int(lengths.sum()), np.int64)
    token_of_row: list[NDArray[np.int64]] = []
    runs: list[tuple[int, int]] = []  # (begin, end)
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
            token_of_row.append(np.arange(starts[first] + begin, starts[first] + shared))
            for i in order[low:high]:
                row_of_token[starts[i] + begin : starts[i] + shared] = np.arange(rows, rows + shared - begin)
            runs.append((rows, rows + shared - begin))
            rows += shared - begin
            stack.append(len(runs) - 1)
            at = shared
        if not alone:
            cuts = [low, *(i for i in range(low + 1, high) if common[i] == shared), high]
            stack.extend((a, b, at) for a, b in reversed(list(pairwise(cuts))))
    return PrefixTree(
        runs=tuple(Run(begin=b, end=e, last=last_of[n]) for n, (b, e) in enumerate(runs)),
        documents=tuple(int(n) for n in lengths),
        row_of_token=row_of_token,
        token_of_row=np.concatenate(token_of_row),
    )


def shared_tokens(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Tokens of the common beginning of two documents."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length


def common_beginning(documents: Sequence[NDArray[np.int32]], shortest: int = SHORTEST) -> int:
    """Tokens that all documents begin with; 0 where they are fewer than `shortest`."""
    found = min((shared_tokens(documents[0], d) for d in documents[1:]), default=0)
    return found if found >= shortest else 0
