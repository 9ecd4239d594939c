"""A tree of documents against a look at every pair of them."""

from __future__ import annotations

import numpy as np
import pytest

from async_rl.model import prefix_tree
from async_rl.model.prefix_tree import make_tree


@pytest.mark.parametrize("at_once", [True, False], ids=["a table", "pair by pair"])
def test_rows_are_shared_exactly_by_documents_that_begin_alike(monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    if not at_once:
        monkeypatch.setattr(prefix_tree, "MOST_TABLE", 0)
    random = np.random.default_rng(0)
    for _ in range(60):
        documents = [
            random.integers(0, 2, random.integers(1, 9)).astype(np.int32) for _ in range(random.integers(1, 7))
        ]
        tree = make_tree(documents, shortest=1)
        beginnings = [tuple(d[: n + 1].tolist()) for d in documents for n in range(len(d))]
        row_of = dict(zip(beginnings, tree.row_of_token.tolist(), strict=True))
        assert [
            row_of[beginning] for beginning in beginnings
        ] == tree.row_of_token.tolist()  # one row for all who share
        assert sorted(row_of.values()) == list(range(tree.num_rows))  # and for nobody else
        tokens = np.concatenate(documents)
        assert (tokens[tree.token_of_row][tree.row_of_token] == tokens).all()
