"""A micro-batch in several parts that are computed side by side on a CPU, each by a thread of its own (a lane).

Threads that share each operation are woken for each and wait for each other in each, for long where a generator is at
work on the same cores. Lanes are woken twice a step. Parts are whole subtrees of the shared prefixes, of about equally
many rows; a beginning that all trajectories have in common is computed in each. Gradients of the parts are added in a
fixed order, so a step is the same bits every time with as many lanes and threads. Each lane holds its own gradient.

Shapes: N rows and p predicting rows of a micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Attention, Decoder
from async_rl.model.prefix_tree import PrefixTree, Run
from async_rl.model.tree_attention import TreeAttention
from async_rl.trainer.arithmetic import ModelArithmetic
from async_rl.trainer.ranks import is_sharded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from async_rl.trainer.packing import MicroBatch

Made = TypeVar("Made")
Given = TypeVar("Given")

LEAST_ROWS = 256
"""of a part"""
MOST_REPEATED = 0.1
"""rows that every part computes, as a share of all"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """What one lane computes: rows of a micro-batch."""

    tokens: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    predicting: Tensor  # [predicting rows of the part] int64
    documents: tuple[int, ...]
    tree: PrefixTree | None

    def attention(self) -> Attention:
        return DocumentAttention(self.documents) if self.tree is None else TreeAttention(self.tree)


def side_by_side(model: object, micro: MicroBatch, arithmetic: ModelArithmetic) -> Tensor | None:
    """Hidden states [p, H] of the rows `micro.predicting`; None where lanes do not serve: one lane, another device,
    another model than the built-in decoder, too few rows, or none to divide them at."""
    if arithmetic.lanes < 2 or micro.tokens.device.type != "cpu" or not isinstance(model, Decoder) or is_sharded(model):
        return None
    parts = divided(micro, arithmetic.lanes)
    if len(parts) < 2:
        return None
    if not torch.is_grad_enabled():
        return torch.cat(in_lanes(partial(_forward, model, arithmetic, False), parts))
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden: Tensor = _SideBySide.apply(model, parts, arithmetic, parameters, *parameters)
    return hidden


def _forward(model: Decoder, arithmetic: ModelArithmetic, graph: bool, part: Part) -> Tensor:
    with torch.set_grad_enabled(graph), arithmetic.autocast(part.tokens.device):
        found: Tensor = model(part.tokens, part.positions, part.attention(), part.predicting)
        return found


class _SideBySide(torch.autograd.Function):
    """Every part has a graph of its own; the parameters are arguments so that their gradients are asked for here."""

    @staticmethod
    def forward(
        ctx: Any, model: Decoder, parts: Sequence[Part], arithmetic: ModelArithmetic, own: list[Tensor], *_: Tensor
    ) -> Tensor:
        ctx.found = in_lanes(partial(_forward, model, arithmetic, True), parts)
        ctx.own = own
        return torch.cat([hidden.detach() for hidden in ctx.found])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        def of_part(pair: tuple[Tensor, Tensor]) -> Sequence[Tensor | None]:
            hidden, pull = pair
            return torch.autograd.grad(hidden, ctx.own, pull, retain_graph=True, allow_unused=True)

        pulls = gradient.split([len(hidden) for hidden in ctx.found])
        totals: list[Tensor | None] = [None] * len(ctx.own)
        for found in in_lanes(of_part, list(zip(ctx.found, pulls, strict=True))):
            totals = [b if a is None else a if b is None else a.add_(b) for a, b in zip(totals, found, strict=True)]
        return None, None, None, None, *totals


def in_lanes(function: Callable[[Given], Made], given: Sequence[Given]) -> list[Made]:
    """The function of each, all at the same time: the last in this thread. They share its threads."""
    threads = torch.get_num_threads()
    each = max(1, threads // len(given))
    pool = _pool(len(given) - 1, each)
    torch.set_num_threads(each)  # OpenMP keeps the number for each thread, MKL for the process
    try:
        waiting = [pool.submit(function, one) for one in given[:-1]]
        last = function(given[-1])
        return [*(future.result() for future in waiting), last]
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(lanes: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(lanes, "lane", initializer=torch.set_num_threads, initargs=(threads,))


# ---------------------------------------------------------------- how rows are divided


def divided(micro: MicroBatch, lanes: int) -> list[Part]:
    """At most `lanes` parts with about equally many rows, all predicting rows once and in order. One part: there is
    nothing to divide."""
    rows = len(micro.tokens)
    common, starts = _subtrees(micro)  # the first `common` rows are before all others
    ideal = [common + (rows - common) * lane // lanes for lane in range(1, lanes)]
    cuts = sorted({min(starts, key=lambda start: (abs(start - wanted), start)) for wanted in ideal})
    bounds = [0, *(cut for cut in cuts if cut > common), rows]
    small = min(end - begin for begin, end in pairwise(bounds)) < LEAST_ROWS
    if len(bounds) < 3 or small or common * (len(bounds) - 2) > MOST_REPEATED * rows:
        return []
    predicting = micro.predicting.numpy()
    if (np.diff(predicting) < 0).any():
        return []
    return [_part(micro, predicting, common, begin, end) for begin, end in pairwise(bounds)]


def _subtrees(micro: MicroBatch) -> tuple[int, list[int]]:
    """(rows that are before all others, rows with which subtrees behind them begin)."""
    if micro.tree is None:
        return 0, [0, *np.cumsum(micro.documents)[:-1].tolist()]
    common, rows = 0, micro.tree.num_rows
    starts: list[int] = []
    behind = 0
    for run in micro.tree.runs:
        if run.begin == common and run.end < run.last == rows:
            common = behind = run.end
        elif run.begin == behind:
            starts.append(run.begin)
            behind = run.last
    return common, starts


def _part(micro: MicroBatch, predicting: NDArray[np.int64], common: int, begin: int, end: int) -> Part:
    """Rows begin <= row < end, with the `common` first ones before them."""
    kept = np.arange(begin, end) if begin == 0 else np.concatenate((np.arange(common), np.arange(begin, end)))
    shift = 0 if begin == 0 else begin - common
    chosen = torch.from_numpy(kept)
    own = predicting[(predicting >= begin) & (predicting < end)] - shift
    if micro.tree is None:
        bounds = np.cumsum((0, *micro.documents))
        first, last = np.searchsorted(bounds, (begin, end))
        documents, tree = micro.documents[first:last], None
    else:
        tree = _subtree(micro.tree, common, begin, end)
        documents = tree.documents
    return Part(
        tokens=micro.tokens[chosen],
        positions=micro.positions[chosen],
        predicting=torch.from_numpy(own),
        documents=documents,
        tree=tree,
    )


def _subtree(tree: PrefixTree, common: int, begin: int, end: int) -> PrefixTree:
    """The tree of `_part`'s rows. Documents that end within the common rows belong to the first part."""
    shift = 0 if begin == 0 else begin - common
    rows = end - shift
    lasts = tree.row_of_token[np.cumsum(tree.documents) - 1]
    of_document = np.split(tree.row_of_token, np.cumsum(tree.documents)[:-1])
    mine = [d for d, last in zip(of_document, lasts, strict=True) if begin <= last < end]
    row_of_token = np.concatenate(mine)
    row_of_token = np.where(row_of_token >= begin, row_of_token - shift, row_of_token)
    token_of_row = np.empty(rows, np.int64)
    token_of_row[row_of_token[::-1]] = np.arange(len(row_of_token))[::-1]  # the first of a row's tokens is written last
    runs = [
        Run(begin=run.begin, end=run.end, last=rows)
        if run.begin < common
        else Run(begin=run.begin - shift, end=run.end - shift, last=run.last - shift)
        for run in tree.runs
        if run.begin < common or begin <= run.begin < end
    ]
    return PrefixTree(
        runs=tuple(runs),
        documents=tuple(map(len, mine)),
        row_of_token=row_of_token,
        token_of_row=token_of_row,
    )
